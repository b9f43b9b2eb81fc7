// Frames and labels for the pictures. The most recently used ones stay in memory.

import * as api from "./api.js";

const KEPT = 60;

class Recent {
  /** @param {number} limit */
  constructor(limit) {
    this.limit = limit;
    /** @type {Map<string, Promise<any>>} the least recently used first */
    this.entries = new Map();
  }

  /** The entry, or the promise of `load`. A pending promise is shared, a failed one is removed. */
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
  // The key contains the clip, because versions may start again with each clip.
  return labels[pane].get(`${clip}/${version}/${number}`, () => api.labels(pane, version, number));
}
