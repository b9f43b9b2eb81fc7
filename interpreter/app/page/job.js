// The messages about the running job and about errors, also for screen readers.

import * as api from "./api.js";
import { byId, plural, setProgress, setShown, setText } from "./dom.js";
import { act, state, update } from "./state.js";

const LOST = "Connection to the server lost; trying again. If this lasts, check that the server is still running.";
/** Screen readers get a message about progress at most once in this time, in milliseconds. */
const SPEAK_EVERY = 4000;

let spoken = 0;
let timer = 0;
let pending = "";

/** Send a text to screen readers. Of several texts in a short time, the last one is sent. */
export function speak(text) {
  pending = text;
  clearTimeout(timer);
  timer = setTimeout(() => {
    spoken = performance.now();
    setText(byId("status"), pending);
  }, Math.max(0, spoken + SPEAK_EVERY - performance.now()));
}

let starting = false;

/**
 * Request a job. A second click before the answer to the first does nothing.
 * @param {"segment"|"compare"|"download"} action
 * @returns {Promise<boolean>} whether the server accepted it
 */
export async function startJob(action, body) {
  if (starting) return false;
  starting = true;
  const taken = await act(() => api.post(action, body));
  starting = false;
  return taken;
}

/** Functions that run when the user cancels a job. */
const cancelled = [];
export const onCancel = (callback) => cancelled.push(callback);

export function startJobLine() {
  byId("job-cancel").addEventListener("click", () => {
    update({ draft: {}, draftSent: false });
    cancelledByUser = true;
    for (const callback of cancelled) callback();
    act(() => api.post("cancel"));
  });
}

/** @param {import("./state.js").Job} job */
function describe(job) {
  if (job.state === "waiting") {
    return job.ahead > 0 ? `Waiting: ${plural(job.ahead, "task")} ahead of yours` : "Waiting: yours is next";
  }
  const count = job.total > 0 ? `${job.done} of ${job.total}` : "";
  return [job.title, [job.step, count].filter(Boolean).join(" ")].filter(Boolean).join(": ");
}

let last = null;
let cancelledByUser = false;

export function renderJobLine() {
  const { job, error } = state.server;
  setShown(byId("job"), job !== null);
  if (job) {
    const text = describe(job);
    setText(byId("job-text"), text);
    const running = job.state === "running";
    setShown(byId("job-bar"), running);
    if (running) setProgress(byId("job-bar"), job.done, job.total);
    if (text !== last?.text) speak(text);
    last = { text, title: job.title };
  } else if (last) {
    if (!error || error.id === state.answered) speak(`${cancelledByUser ? "Cancelled" : "Finished"}: ${last.title}`);
    last = null;
    cancelledByUser = false;
  }
  const fromServer = error && error.id !== state.answered ? error.text : "";
  setText(byId("error"), state.error || fromServer || (state.lost ? LOST : ""));
}
