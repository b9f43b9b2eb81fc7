// The tab Segment: a video, a model, the pictures, and the segments with their corrections and downloads.

import { ask } from "./ask.js";
import { renderControls, renderOpacity, settings } from "./controls.js";
import { byId, setChoices, setShown, setText } from "./dom.js";
import { renderDownloads } from "./downloads.js";
import { renderEdits } from "./edits.js";
import { startJob } from "./job.js";
import { Player } from "./player.js";
import { state } from "./state.js";
import { renderUpload } from "./upload.js";
import { View } from "./view.js";

const LOST_EDITS = "Segmenting again discards your corrections; Undo cannot bring them back.";

export const view = new View("segment", [
  { canvas: byId("original"), pane: "main", tinted: false },
  { canvas: byId("overlay"), pane: "main", tinted: true },
]);
const player = new Player(byId("segment-player"), view);

/** Whether the select shows the source of the segments, after the page was reloaded. */
let followed = false;

export function startSegment() {
  byId("segment-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const pane = state.server.panes.main;
    const source = byId("source").value;
    if (pane?.undo && !(await ask(LOST_EDITS, { yes: "Segment again", no: "Keep my corrections" }))) return;
    // A different model has different settings.
    startJob("segment", { source, settings: pane?.source === source ? settings(pane) : {} });
  });
  byId("source").addEventListener("change", renderSource);
}

function renderSource() {
  const source = state.session?.sources.find(({ id }) => id === byId("source").value);
  setText(byId("source-detail"), source?.detail ?? "");
}

export function renderSegment() {
  const { clip, job, panes } = state.server;
  const sources = state.session?.sources ?? [];
  setShown(byId("no-sources"), state.session !== null && sources.length === 0);
  setChoices(byId("source"), sources.map(({ id, label }) => ({ value: id, label })));
  if (panes.main && !followed) byId("source").value = panes.main.source;
  followed = panes.main !== null;
  renderSource();
  renderUpload();
  byId("source").disabled = sources.length === 0;
  byId("segment-button").disabled = !clip || sources.length === 0 || job !== null || state.upload !== null;

  setShown(byId("no-clip"), clip === null && sources.length > 0);
  setShown(byId("pictures"), clip !== null);
  setShown(byId("overlay"), panes.main !== null);
  setShown(byId("overlay-empty"), panes.main === null);
  if (clip) byId("overlay-empty").style.setProperty("--aspect", String((clip.width * clip.aspect) / clip.height));
  setText(byId("overlay-empty"), job?.kind === "segment" ? "The segments appear here when they are ready."
    : "No segments yet. Press Segment to find the objects.");
  setShown(byId("work"), clip !== null && panes.main !== null);
  player.render();
  view.render();
  renderEdits();
  renderControls();
  renderOpacity();
  renderDownloads();
}
