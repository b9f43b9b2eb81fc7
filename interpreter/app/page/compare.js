// The tab Compare: two models on the same video, side by side.

import { byId, setChoices, setShown, setText } from "./dom.js";
import { startJob } from "./job.js";
import { renderLegend } from "./list.js";
import { Player } from "./player.js";
import { state } from "./state.js";
import { openTab } from "./tabs.js";
import { View } from "./view.js";

const SIDES = ["left", "right"];

const view = new View("compare", SIDES.map((side) => ({ canvas: byId(`${side}-canvas`), pane: side, tinted: true })));
const player = new Player(byId("compare-player"), view);

export function startCompare() {
  byId("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    startJob("compare", { left: byId("left").value, right: byId("right").value });
  });
  byId("go-to-segment").addEventListener("click", () => {
    openTab("segment");
    byId("tab-segment").focus();
  });
}

/** Offer the sources. At the start, select two different ones. */
function renderChoices(sources) {
  const first = byId("right").options.length === 0;
  for (const side of SIDES) setChoices(byId(side), sources.map(({ id, label }) => ({ value: id, label })));
  if (first && sources.length > 1) byId("right").value = sources[1].id;
}

export function renderCompare() {
  const { clip, job, panes, agreement } = state.server;
  const sources = state.session?.sources ?? [];
  const some = sources.length > 0;
  setShown(byId("compare-no-sources"), state.session !== null && !some);
  setShown(byId("compare-no-clip"), some && !clip);
  setShown(byId("compare-form"), some && clip !== null);
  renderChoices(sources);
  byId("compare-button").disabled = job !== null;

  const both = clip !== null && panes.left !== null && panes.right !== null;
  setShown(byId("compare-pictures"), both);
  setShown(byId("agreement"), both && agreement !== null);
  if (!both) return;
  if (agreement !== null) setText(byId("agreement"), `Agreement (adjusted Rand index): ${agreement.toFixed(2)}`);
  for (const side of SIDES) {
    setText(byId(`${side}-title`), panes[side].label);
    setText(byId(`${side}-note`), panes[side].note ?? "");
    setShown(byId(`${side}-note`), Boolean(panes[side].note));
    renderLegend(byId(`${side}-list`), panes[side].segments);
  }
  player.render();
  view.render();
}
