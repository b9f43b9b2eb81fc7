// Downloads: a job writes each file, and the browser then saves it.

import * as api from "./api.js";
import { make } from "./dom.js";
import { onCancel, startJob } from "./job.js";
import { state } from "./state.js";

/** @type {Map<string, any>} formats that this tab waits for, with the id of the earlier file */
const awaited = new Map();
/** Ids of files, with the opacity that was requested. */
const opacities = new Map();

const buttons = () => document.querySelectorAll("button[data-format]");

export function startDownloads() {
  for (const button of buttons()) button.addEventListener("click", () => request(button.dataset.format));
  onCancel(() => awaited.clear());
}

async function request(format) {
  const { opacity } = state;
  const there = state.server.downloads[format];
  // A file of the same masks exists already. An overlay also needs the same opacity.
  if (there && (format !== "overlay" || opacities.get(there.id) === opacity)) return save(format);
  awaited.set(format, { before: there?.id, opacity });
  if (!(await startJob("download", { format, opacity }))) awaited.delete(format);
  return undefined;
}

let failure = null;

/** Save each finished file once. Called for every state of the server. */
export function saveReady() {
  const { downloads, error } = state.server;
  if (error && error.id !== failure) {
    failure = error.id;
    awaited.clear();
  }
  for (const [format, { before, opacity }] of awaited) {
    const ready = downloads[format];
    if (!ready || ready.id === before) continue;
    awaited.delete(format);
    opacities.set(ready.id, opacity);
    save(format);
  }
}

function save(format) {
  const link = make("a", { href: api.downloadUrl(format), download: "", hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
}

export function renderDownloads() {
  const busy = state.server.job !== null;
  for (const button of buttons()) button.disabled = busy || !state.server.panes.main;
}
