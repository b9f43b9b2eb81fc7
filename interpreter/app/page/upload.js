// Choosing a video, with the button or by dropping it, and uploading it.

import * as api from "./api.js";
import { ask } from "./ask.js";
import { byId, plural, setProgress, setShown, setText } from "./dom.js";
import { speak } from "./job.js";
import { act, state, update } from "./state.js";

let abort = () => {};

export function startUpload() {
  const input = byId("file");
  input.addEventListener("change", () => {
    const [file] = input.files;
    // Clear the field, so that the same file can be chosen again after an error.
    input.value = "";
    if (file) send(file);
  });
  byId("upload-cancel").addEventListener("click", () => abort());
  byId("remove-clip").addEventListener("click", remove);

  // The whole page accepts a drop. Otherwise, a drop next to the zone makes the browser leave the page.
  const zone = byId("drop-zone");
  const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    zone.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) zone.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    zone.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file && state.tab === "segment") send(file);
  });
}

/** Ask before corrections are lost. */
async function mayReplace() {
  if (!state.server.panes.main?.undo) return true;
  const answers = { yes: "Discard and continue", no: "Keep the video" };
  return ask("This discards your corrections to the current video.", answers);
}

async function send(file) {
  if (state.upload || !state.session) return;
  const { megabytes } = state.session.limits;
  await act(async () => {
    if (file.size > megabytes * 1e6) {
      throw new Error(`${file.name} has ${Math.ceil(file.size / 1e6)} MB; at most ${megabytes} MB can be sent.`);
    }
    if (!(await mayReplace())) return;
    const sending = api.upload(file, (percent) => update({ upload: { name: file.name, percent } }));
    abort = sending.abort;
    update({ upload: { name: file.name, percent: 0 } });
    try {
      const clip = await sending.done;
      if (clip) speak(`${clip.name} is here: ${plural(clip.frames, "frame")}`);
    } finally {
      update({ upload: null });
    }
  });
}

async function remove() {
  if (await mayReplace()) act(api.removeClip);
}

export function renderUpload() {
  const { session, upload } = state;
  const { clip } = state.server;
  if (session) {
    const { megabytes, frames } = session.limits;
    setText(byId("limits"), `At most ${megabytes}\u00a0MB and ${plural(frames, "frame")}.`);
  }
  byId("drop-zone").classList.toggle("filled", clip !== null);
  const facts = clip && [plural(clip.frames, "frame"), `${clip.width} × ${clip.height} pixels`,
    `${Number(clip.fps.toFixed(2))} frames per second`].join(", ");
  setShown(byId("limits"), clip === null);
  setText(byId("file-label"), clip ? "Choose another video" : "Choose a video");
  byId("file-label").classList.toggle("primary", clip === null);
  setText(byId("clip-text"), clip ? `${clip.name}: ${facts}.` : "or drop it here.");
  byId("file").disabled = !session || upload !== null;
  setShown(byId("remove-clip"), clip !== null);
  setShown(byId("upload"), upload !== null);
  if (upload) {
    setProgress(byId("upload-bar"), upload.percent, upload.percent < 100 ? 100 : 0);
    setText(byId("upload-text"), upload.percent < 100 ? `Sending ${upload.percent} %` : "Reading the video …");
  }
}
