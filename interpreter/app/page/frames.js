// What the pictures need, loaded once: the frames and the labels used last stay in memory.

import * as api from "./api.js";

const KEPT = 60;

class Recent {
  /** @param {number} limit */
  constructor(limit) {
    this.limit = limit;
    /** @type {Map<string, Promise<any>>} the least recently used first */
    this.entries = new Map();
  }

  /** The entry, or what `load` promises; a promise under way is shared, a failed one is dropped. */
  get(key, load) {
    const entry = this.entries.get(key) ?? load();
    this.entries.delete(key);
    this.entries.set(key, entry);
    entry.catch(() => {
      if (this.entries.get(key) === entry) this.entries.delete(key);
    });
    if (this.entries.size > this.limit) this.entries.delete(this.entries.keys().next().value);
    return entry;
  }
}

const frames = new Recent(KEPT);
const labels = { main: new Recent(KEPT), left: new Recent(KEPT), right: new Recent(KEPT) };

/** @returns {Promise<Blob>} */
export const getFrame = (clip, number) => frames.get(`${clip}/${number}`, () => api.frame(clip, number));

/** @returns {Promise<Uint8Array>} row by row, one byte a pixel */
export function getLabels(pane, version, clip, number) {
  // A clip is in the key, for versions may start anew with each clip.
  return labels[pane].get(`${clip}/${version}/${number}`, () => api.labels(pane, version, number));
}
