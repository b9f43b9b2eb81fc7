// Corrections: the toolbar, its shortcuts, and clicks on the pictures.

import * as api from "./api.js";
import { byId, plural, setShown, setText } from "./dom.js";
import { speak } from "./job.js";
import { renderSegmentList, toggle } from "./list.js";
import { act, receiveMain, segmentName, state, update } from "./state.js";

const DONE = { merge: "Merged", split: "Split", hide: "Hidden", show: "Shown", name: "Name saved", undo: "Undone",
  redo: "Redone" };

/** Edits run one after another. Each starts from the result of the earlier one. */
let queue = Promise.resolve();

/** @param {() => any} step */
function inTurn(step) {
  queue = queue.then(() => (locked() ? null : step())).catch((error) => update({ error: error.message }));
}

function edit(kind, segments, more = {}) {
  const body = segments ? { kind, segments, ...more } : { kind };
  return act(async () => {
    const before = new Set(state.server.panes.main?.segments.map(({ id }) => id));
    const { pane } = await api.post("edit", body);
    receiveMain(pane);
    // Select the parts of a split segment, so that the user sees them.
    if (kind === "split") {
      const parts = pane.segments.map(({ id }) => id).filter((id) => !before.has(id) || segments.includes(id));
      update({ selection: new Set(parts) });
    }
    speak(`${DONE[kind]}. ${plural(pane.segments.length, "segment")}.`);
  });
}

const pane = () => state.server.panes.main;
const selected = () => pane()?.segments.filter(({ id }) => state.selection.has(id)) ?? [];

/** Whether a job computes the masks or writes them to a file: then, they must not change. */
const locked = () => !pane() || ["segment", "download"].includes(state.server.job?.kind);

/** The action of each button, its shortcut, and whether it is possible now. */
const ACTIONS = {
  merge: { keys: "m", title: "Join the selected segments into one, in all frames", can: () => selected().length > 1 },
  split: { keys: "s", title: "Divide the selected segment into two: show a frame in which both parts are visible first", can: () => selected().length === 1 },
  hide: { keys: "h", title: "Hide or show the selected segments", can: () => selected().length > 0 },
  undo: { keys: "Ctrl+Z", title: "Undo the last correction", can: () => pane().undo },
  redo: { keys: "Ctrl+Shift+Z", title: "Redo the correction", can: () => pane().redo },
};
const ARIA_KEYS = { "Ctrl+Z": "Control+Z", "Ctrl+Shift+Z": "Control+Shift+Z" };

const anyVisible = () => selected().some(({ hidden }) => !hidden);

function run(action) {
  if (!ACTIONS[action].can()) return null;
  const ids = selected().map(({ id }) => id);
  if (action === "undo" || action === "redo") return edit(action);
  if (action === "hide") return edit(anyVisible() ? "hide" : "show", ids);
  // The server looks for the parts in the frame that is shown.
  return edit(action, ids, action === "split" ? { frame: state.frame } : {});
}

export function startEdits(view) {
  for (const [action, { keys, title }] of Object.entries(ACTIONS)) {
    const button = byId(action);
    button.title = `${title} (${keys})`;
    button.setAttribute("aria-keyshortcuts", ARIA_KEYS[keys] ?? keys);
    button.addEventListener("click", () => inTurn(() => run(action)));
  }
  byId("name-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const [segment] = selected();
    const name = byId("segment-name").value.trim();
    if (segment) inTurn(() => edit("name", [segment.id], { name }));
  });
  for (const { canvas, pane: key } of view.pictures) {
    // The original shows no masks, but a click on it selects segments too.
    canvas.addEventListener("click", (event) => {
      const id = view.segmentAt(event, key);
      if (id !== null) toggle(id, event.shiftKey || event.ctrlKey || event.metaKey);
    });
    canvas.addEventListener("pointermove", (event) => {
      const hover = view.segmentAt(event, key);
      if (hover !== state.hover) update({ hover });
    });
    canvas.addEventListener("pointerleave", () => update({ hover: null }));
  }
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  if (state.tab !== "segment" || byId("ask").open || event.altKey) return;
  const typing = event.target.matches("input[type=text], select, textarea");
  if (event.key === "Escape" && state.selection.size > 0) update({ selection: new Set() });
  // Letters are shortcuts in the area of the segments, and if nothing has the focus, as after a click on a picture.
  const elsewhere = event.target !== document.body && !event.target.closest("#work, #pictures");
  if (typing || elsewhere) return;
  const key = event.key.toLowerCase();
  let action;
  if (event.ctrlKey || event.metaKey) action = key === "z" ? (event.shiftKey ? "redo" : "undo") : undefined;
  else if (!event.repeat) action = { m: "merge", s: "split", h: "hide" }[key];
  if (!action) return;
  event.preventDefault();
  inTurn(() => run(action));
}

let named = null;

export function renderEdits() {
  if (!pane()) return;
  const chosen = selected();
  for (const [action, { can }] of Object.entries(ACTIONS)) byId(action).disabled = locked() || !can();
  setText(byId("hide"), chosen.length === 0 || anyVisible() ? "Hide" : "Show");

  const one = chosen.length === 1 ? chosen[0] : null;
  setShown(byId("name-form"), chosen.length > 0);
  byId("segment-name").disabled = !one;
  byId("save-name").disabled = !one || locked();
  // Update the field only for a new selection or a new saved name, because the user may be typing.
  const source = one ? `${one.id} ${one.name}` : null;
  if (source !== named) {
    byId("segment-name").value = one?.name ?? "";
    byId("segment-name").placeholder = one ? segmentName({ ...one, name: "" }) : "";
    named = source;
  }
  setText(byId("selection-text"), chosen.length === 0 ? "Nothing is selected."
    : `${plural(chosen.length, "segment")} selected: ${chosen.map(segmentName).join(", ")}.`);
  setText(byId("pane-note"), pane().note ?? "");
  setShown(byId("pane-note"), Boolean(pane().note));
  renderSegmentList((kind, ids) => inTurn(() => edit(kind, ids)));
}
