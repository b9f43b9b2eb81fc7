// The tab Training: the progress of the runs. It asks the server only while the tab is visible.

import * as api from "./api.js";
import { byId, make, setChoices, setProgress, setShown, setText } from "./dom.js";
import { state, update } from "./state.js";

const EVERY = 3000;

/** @type {null|{id: string, label: string, method: string, training: boolean, stages: any[]}[]} */
let runs = null;
/** @type {any} the latest report about the chosen run */
let report = null;
let timer = 0;
let asking = 0;
/** Index of the picture, counted back from the newest. 0 always shows the newest one. */
let back = 0;
/** The error of the last request. A successful answer removes it from the page. */
let failure = "";

const watched = () => state.tab === "training" && !document.hidden;

export function startTraining() {
  byId("run").addEventListener("change", () => {
    report = null;
    back = 0;
    ask();
  });
  byId("picture-slider").addEventListener("input", (event) => {
    back = Number(event.target.max) - Number(event.target.value);
    renderPicture();
  });
  document.addEventListener("visibilitychange", renderTraining);
}

/** Ask now, and again every few seconds. The answer to an older request is ignored. */
async function ask() {
  clearTimeout(timer);
  asking += 1;
  const mine = asking;
  timer = -1;
  try {
    const list = await api.runs();
    if (mine !== asking) return;
    runs = list;
    setChoices(byId("run"), runs.map(({ id, label }) => ({ value: id, label })));
    const answer = runs.length > 0 ? await api.training(byId("run").value) : null;
    if (mine !== asking) return;
    report = answer;
    if (failure && state.error === failure) update({ error: "" });
    failure = "";
  } catch (error) {
    if (mine !== asking) return;
    failure = error.message;
    update({ error: failure });
  }
  timer = 0;
  if (watched()) timer = setTimeout(ask, EVERY);
  draw();
}

export function renderTraining() {
  if (watched()) {
    if (timer === 0) ask();
    return;
  }
  // While the tab is hidden, send no requests. A pending request ends normally.
  if (timer > 0) {
    clearTimeout(timer);
    timer = 0;
  }
}

function draw() {
  setShown(byId("no-runs"), runs !== null && runs.length === 0);
  setShown(byId("run-view"), runs !== null && runs.length > 0);
  if (!report) return;
  const { stages, curves, training } = report;
  const label = runs.find(({ id }) => id === byId("run").value)?.label ?? "RUN";
  const running = training ? "Training is running." : "Training is not running.";
  const none = `This run has no training yet. Start one with python -m interpreter.train --run ${label}; `
    + "this page updates by itself.";
  setText(byId("run-state"), stages.length === 0 && !training ? none : running);
  byId("run-state").classList.toggle("live", training);
  renderStages(stages);
  setShown(byId("curves-section"), Boolean(curves));
  if (curves) {
    const figures = stages.map((stage) => `${stage.name}: step ${stage.step} of ${stage.steps}, loss ${loss(stage)}`);
    setImage(byId("curves"), curves, `Curves of the training. ${figures.join("; ")}.`);
  }
  renderPicture();
}

const loss = (stage) => (typeof stage.loss === "number" ? String(Number(stage.loss.toPrecision(4))) : "not known");

function ago(seconds) {
  if (typeof seconds !== "number") return "no record yet";
  if (seconds < 120) return `last record ${Math.round(seconds)} s ago`;
  if (seconds < 7200) return `last record ${Math.round(seconds / 60)} min ago`;
  return `last record ${Math.round(seconds / 3600)} h ago`;
}

function renderStages(stages) {
  const list = byId("stages");
  const rows = new Map([...list.children].map((row) => [row.dataset.name, row]));
  for (const stage of stages) {
    let row = rows.get(stage.name);
    rows.delete(stage.name);
    if (!row) {
      const bar = make("progress", { "aria-label": `Progress of ${stage.name}` });
      row = make("li", {}, make("h2", { textContent: stage.name }), bar, make("p"));
      row.dataset.name = stage.name;
      list.append(row);
    }
    setProgress(row.children[1], stage.step, stage.steps);
    setText(row.children[2], `step ${stage.step} of ${stage.steps}, loss ${loss(stage)}, ${ago(stage.seconds_ago)}`);
  }
  for (const row of rows.values()) row.remove();
}

function renderPicture() {
  const { pictures } = report;
  setShown(byId("emerging"), pictures.length > 0);
  if (pictures.length === 0) return;
  const last = pictures.length - 1;
  back = Math.min(back, last);
  const { stage, step, url } = pictures[last - back];
  const text = `${stage}, step ${step}`;
  setImage(byId("picture"), url, `Masks at ${text}`);
  setText(byId("picture-label"), back === 0 ? `${text} (newest)` : text);
  const slider = byId("picture-slider");
  slider.max = String(last);
  slider.value = String(last - back);
  slider.disabled = last === 0;
  slider.setAttribute("aria-valuetext", text);
  setText(byId("picture-value"), `${last - back + 1} of ${pictures.length}`);
}

function setImage(image, url, alt) {
  if (image.getAttribute("src") !== url) image.src = url;
  if (image.alt !== alt) image.alt = alt;
}
