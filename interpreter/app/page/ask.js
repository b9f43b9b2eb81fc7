// A dialog with a question and two answers.

import { byId, setText } from "./dom.js";

/**
 * @param {string} text
 * @param {{yes: string, no: string}} answers labels of the buttons
 * @returns {Promise<boolean>} false also for Escape
 */
export function ask(text, { yes, no }) {
  const dialog = byId("ask");
  if (dialog.open) return Promise.resolve(false);
  setText(byId("ask-text"), text);
  setText(byId("ask-yes"), yes);
  setText(byId("ask-no"), no);
  dialog.returnValue = "no";
  byId("ask-yes").onclick = () => dialog.close("yes");
  byId("ask-no").onclick = () => dialog.close("no");
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
