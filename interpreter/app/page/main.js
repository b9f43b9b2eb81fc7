// Start of the page: opens the session, follows the state of the server, and draws.

import * as api from "./api.js";
import { renderCompare, startCompare } from "./compare.js";
import { sendChanges, startControls } from "./controls.js";
import { byId, setText } from "./dom.js";
import { saveReady, startDownloads } from "./downloads.js";
import { startEdits } from "./edits.js";
import { renderJobLine, startJobLine } from "./job.js";
import { renderSegment, startSegment, view } from "./segment.js";
import { forget, onUpdate, receive, state, update } from "./state.js";
import { renderTabs, startTabs } from "./tabs.js";
import { renderTraining, startTraining } from "./training.js";
import { startUpload } from "./upload.js";
import { View } from "./view.js";

const AGAIN = 2000;

async function connect() {
  try {
    const { session, gone } = await api.openSession();
    update({ session, lost: false, error: gone ? api.GONE : "" });
  } catch (error) {
    update({ error: error.message });
    setTimeout(connect, AGAIN);
    return;
  }
  setText(byId("version"), `Version ${state.session.version}`);
  api.listen({
    onState: (server) => {
      if (state.lost) {
        View.retry();
        update({ error: "" });
      }
      receive(server);
      api.rememberClip(server.clip !== null);
      saveReady();
      sendChanges();
    },
    onLost: () => update({ lost: true }),
    onClosed: () => {
      // The session has usually ended. `openSession` checks this, and opens a new one.
      forget();
      setTimeout(connect, AGAIN / 4);
    },
  });
}

function render() {
  const before = document.activeElement;
  renderTabs();
  renderJobLine();
  renderSegment();
  renderCompare();
  renderTraining();
  keepFocus(before);
}

/** The element with the focus before it was disabled. @type {any} */
let left = null;

const usable = (node) => node.isConnected && !node.disabled && node.closest("[hidden]") === null;

/** If the focused button is disabled or hidden, move the focus, and move it back as soon as possible. */
function keepFocus(before) {
  if (before === null || before === document.body || usable(before)) return;
  const cancels = [byId("job-cancel"), byId("upload-cancel")];
  const back = cancels.includes(before) && left && usable(left) ? left : null;
  const next = back ?? [...cancels, byId("segments-title"), byId(`tab-${state.tab}`)].find(usable);
  if (!cancels.includes(before)) left = before;
  next.focus({ preventScroll: true });
}

onUpdate(render);
startTabs();
startJobLine();
startUpload();
startSegment();
startEdits(view);
startControls();
startDownloads();
startCompare();
startTraining();
connect();
