// The state of the page, from which everything on the screen is drawn. `update` changes it and draws again.

/**
 * @typedef {{id: number, name: string, hidden: boolean, area: number, colour: string}} Segment
 * @typedef {{name: string, label: string, help: string, kind: "range"|"choice", value: number|string|null,
 *   default: number|string|null, min?: number, max?: number, step?: number,
 *   choices?: {value: string, label: string}[], slow: boolean}} Control
 * @typedef {{source: string, label: string, version: number, made: number, settings: Record<string, any>,
 *   controls: Control[], segments: Segment[], undo: boolean, redo: boolean, note: string|null}} Pane
 * @typedef {{id: string, name: string, frames: number, width: number, height: number, fps: number, aspect: number,
 *   view: [number, number]}} Clip
 * @typedef {{id: string, kind: string, title: string, state: "waiting"|"running", ahead: number,
 *   step: string, done: number, total: number}} Job
 * @typedef {{clip: Clip|null, job: Job|null, error: {id: any, text: string}|null,
 *   panes: Record<"main"|"left"|"right", Pane|null>, agreement: number|null,
 *   downloads: Record<string, {name: string, bytes: number, id: any}>}} Server
 */

/** @type {Server} */
const NOTHING = {
  clip: null, job: null, error: null, panes: { main: null, left: null, right: null }, agreement: null, downloads: {},
};

export const state = {
  /** @type {null|{token: string, sources: any[], limits: {megabytes: number, frames: number}, version: string}} */
  session: null,
  server: NOTHING,
  tab: "segment",
  /** @type {null|{name: string, percent: number}} */
  upload: null,
  /** An error of this page, such as a refused request. */
  error: "",
  /** Id of the server's error that is hidden, because the user has done something since. */
  answered: null,
  /** Whether there is no connection to the server. */
  lost: false,
  frame: 0,
  playing: false,
  opacity: 0.5,
  /** @type {Set<number>} ids of selected segments; replaced, never changed, so that views can compare it */
  selection: new Set(),
  /** @type {number|null} id of the segment under the pointer */
  hover: null,
  /** @type {Record<string, any>} settings that the user changed and the server's pane does not have yet */
  draft: {},
  draftSent: false,
};

let draw = () => {};
let drawing = false;

export function onUpdate(callback) {
  draw = callback;
}

/** @param {Partial<typeof state>} change */
export function update(change) {
  Object.assign(state, change);
  if (drawing) return;
  drawing = true;
  // Draw several changes in one task only once.
  queueMicrotask(() => {
    drawing = false;
    draw();
  });
}

/** Use a new state of the server. @param {Server} server */
export function receive(server) {
  const before = state.server;
  const change = { server, lost: false };
  if (server.clip?.id !== before.clip?.id) Object.assign(change, { frame: 0, playing: false, hover: null });
  // After an edit, numbers still mean the same segments. After a new segmentation, they do not.
  const again = server.panes.main?.made !== before.panes.main?.made;
  Object.assign(change, again ? { selection: new Set() } : selectionIn(server.panes.main));
  const finished = before.job && !server.job;
  const replaced = before.panes.main?.version !== server.panes.main?.version;
  const failed = server.error && server.error.id !== before.error?.id;
  if (failed || (state.draftSent && (finished || replaced))) Object.assign(change, { draft: {}, draftSent: false });
  update(change);
}

/** Use the pane in the answer to an edit. @param {Pane} pane */
export function receiveMain(pane) {
  const server = { ...state.server, panes: { ...state.server.panes, main: pane } };
  update({ server, ...selectionIn(pane) });
}

/** The selection without segments that no longer exist. @param {Pane|null} pane */
function selectionIn(pane) {
  const ids = new Set(pane?.segments.map(({ id }) => id));
  const kept = [...state.selection].filter((id) => ids.has(id));
  return kept.length === state.selection.size ? {} : { selection: new Set(kept) };
}

export function forget() {
  update({ server: NOTHING, selection: new Set(), hover: null, frame: 0, playing: false, draft: {}, draftSent: false });
}

/** Run an action of the user: remove old errors, and show a new one. @returns whether it succeeded */
export async function act(action) {
  update({ error: "", answered: state.server.error?.id ?? null });
  try {
    await action();
    return true;
  } catch (error) {
    update({ error: error.message });
    return false;
  }
}

export const segmentName = ({ name, id }) => name || `segment ${id}`;
