// The three tabs. A click or the arrow keys choose one.

import { byId, setShown } from "./dom.js";
import { state, update } from "./state.js";

const NAMES = ["segment", "compare", "training"];

export function startTabs() {
  NAMES.forEach((name, index) => {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => openTab(name));
    tab.addEventListener("keydown", ({ key }) => {
      const last = NAMES.length - 1;
      const [right, left] = [index === last ? 0 : index + 1, index === 0 ? last : index - 1];
      const to = { ArrowRight: right, ArrowLeft: left, Home: 0, End: last };
      if (!(key in to)) return;
      openTab(NAMES[to[key]]);
      byId(`tab-${NAMES[to[key]]}`).focus();
    });
  });
}

export function openTab(name) {
  update({ tab: name, playing: false, hover: null });
}

export function renderTabs() {
  for (const name of NAMES) {
    const chosen = state.tab === name;
    const tab = byId(`tab-${name}`);
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    setShown(byId(`panel-${name}`), chosen);
  }
}
