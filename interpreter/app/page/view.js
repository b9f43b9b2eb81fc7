// Two canvases that show the same frame: loads what they need, paints it, and finds the segment under the pointer.

import { getFrame, getLabels } from "./frames.js";
import { paintSegments } from "./paint.js";
import { state, update } from "./state.js";

const AHEAD_PLAYING = 6;
const AHEAD_STILL = 2;

/**
 * @typedef {{canvas: HTMLCanvasElement, pane: "main"|"left"|"right", tinted: boolean}} Picture
 * pane: the pane whose segments a click selects; tinted: whether they are painted
 */

/** @type {View[]} */
const views = [];

export class View {
  /** @param {string} tab @param {Picture[]} pictures */
  constructor(tab, pictures) {
    this.tab = tab;
    this.pictures = pictures;
    /** @type {null|{clip: string, frame: number, bitmap: ImageBitmap, labels: Record<string, Uint8Array>,
     *   versions: Record<string, any>}} what the canvases show */
    this.shown = null;
    this.painted = [];
    this.loading = false;
    /** A failed request. It is not repeated until something else was requested. */
    this.failed = "";
    this.layer = document.createElement("canvas");
    views.push(this);
  }

  /** The content that the canvases should show now. */
  wanted() {
    const { clip, panes } = state.server;
    if (!clip || state.tab !== this.tab) return null;
    const versions = {};
    for (const { pane } of this.pictures) if (panes[pane]) versions[pane] = panes[pane].version;
    return { clip, frame: state.frame, versions };
  }

  isCurrent() {
    const wanted = this.wanted();
    return wanted !== null && same(wanted, this.shown);
  }

  /** Let all views repeat failed requests, because the connection works again. */
  static retry() {
    for (const view of views) view.failed = "";
  }

  /** Called after every change of the state. */
  render() {
    const wanted = this.wanted();
    if (!wanted) return;
    this.paint();
    if (!same(wanted, this.shown) && keyOf(wanted) !== this.failed) this.load();
  }

  /** Load until the newest request is shown, one frame at a time, so that an older answer never follows a newer one. */
  async load() {
    if (this.loading) return;
    this.loading = true;
    for (let wanted = this.wanted(); wanted && !same(wanted, this.shown); wanted = this.wanted()) {
      try {
        this.install(await fetchAll(wanted));
      } catch (error) {
        const now = this.wanted();
        // The clip or the masks may have changed since the request. Then load the new ones.
        if (now && sameMasks(now, wanted)) {
          this.failed = keyOf(wanted);
          update({ error: error.message, playing: false });
          break;
        }
      }
    }
    this.loading = false;
    this.loadAhead();
  }

  install(loaded) {
    const now = this.wanted();
    if (!now || !sameMasks(now, loaded)) return loaded.bitmap.close();
    this.shown?.bitmap.close();
    this.shown = loaded;
    this.failed = "";
    this.painted = [];
    this.paint();
    // A player may be waiting for this frame.
    return update({});
  }

  loadAhead() {
    const wanted = this.wanted();
    if (!wanted) return;
    const count = Math.min(state.playing ? AHEAD_PLAYING : AHEAD_STILL, wanted.clip.frames - 1);
    for (let step = 1; step <= count; step++) {
      const number = (state.frame + step) % wanted.clip.frames;
      // An error is reported when the frame is shown.
      Promise.all(requests({ ...wanted, frame: number })).catch(() => {});
    }
  }

  paint() {
    const { shown } = this;
    const { clip, panes } = state.server;
    if (!shown || shown.clip !== clip?.id) return;
    const [height, width] = clip.view;
    this.pictures.forEach(({ canvas, pane, tinted }, index) => {
      const labels = tinted && panes[pane] ? shown.labels[pane] : undefined;
      const mine = pane === "main";
      const look = [shown, labels, panes[pane], state.opacity, mine && state.hover, mine && state.selection];
      if (this.painted[index]?.every((part, at) => part === look[at])) return;
      this.painted[index] = look;
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      canvas.style.setProperty("--aspect", String((clip.width * clip.aspect) / clip.height));
      const context = canvas.getContext("2d");
      context.drawImage(shown.bitmap, 0, 0, width, height);
      // The content of the canvas, for tests.
      Object.assign(canvas.dataset, { frame: shown.frame, version: shown.versions[pane] ?? "" });
      if (!labels) return;
      Object.assign(this.layer, { width, height });
      const { segments } = panes[pane];
      const hover = mine ? state.hover : null;
      const selection = mine ? state.selection : new Set();
      const image = paintSegments(labels, height, width, { segments, opacity: state.opacity, hover, selection });
      this.layer.getContext("2d").putImageData(image, 0, 0);
      context.drawImage(this.layer, 0, 0);
    });
  }

  /** Id of the segment at a pointer event on one of the canvases, or null. */
  segmentAt(event, pane) {
    const labels = this.shown?.labels[pane];
    if (!labels || this.shown.clip !== state.server.clip?.id) return null;
    const [height, width] = state.server.clip.view;
    const box = event.currentTarget.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * height);
    if (x < 0 || y < 0 || x >= width || y >= height) return null;
    const id = labels[y * width + x];
    return state.server.panes[pane]?.segments.some((segment) => segment.id === id) ? id : null;
  }
}

function requests({ clip, frame, versions }) {
  const labels = Object.entries(versions).map(([pane, version]) => getLabels(pane, version, clip.id, frame));
  return [getFrame(clip.id, frame), ...labels];
}

async function fetchAll(wanted) {
  const [blob, ...parts] = await Promise.all(requests(wanted));
  const labels = {};
  Object.keys(wanted.versions).forEach((pane, index) => {
    labels[pane] = parts[index];
  });
  const bitmap = await createImageBitmap(blob);
  return { clip: wanted.clip.id, frame: wanted.frame, versions: wanted.versions, labels, bitmap };
}

const keyOf = ({ clip, frame, versions }) => JSON.stringify([clip.id, frame, versions]);

const clipId = (clip) => clip?.id ?? clip;

/** Same clip and same masks. The frame can differ: while the slider moves, frames in between are shown too. */
function sameMasks(one, other) {
  return clipId(one.clip) === clipId(other.clip)
    && JSON.stringify(one.versions) === JSON.stringify(other.versions);
}

const same = (wanted, shown) => shown !== null && wanted.frame === shown.frame && sameMasks(wanted, shown);
