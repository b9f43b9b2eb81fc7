// Paints segments over a frame, from the label of each pixel.

const WHITE = 0xffffffff;
const DARK = 0xff1a1410;

/**
 * @typedef {{segments: import("./state.js").Segment[], opacity: number, hover: number|null,
 *   selection: Set<number>}} Look
 */

/**
 * Tint and outlines as a picture that is drawn over the frame.
 * @param {Uint8Array} labels
 * @param {number} height
 * @param {number} width
 * @param {Look} look
 * @returns {ImageData}
 */
export function paintSegments(labels, height, width, look) {
  const image = new ImageData(width, height);
  // One 32-bit write per pixel. On little-endian machines, the bytes in memory are R, G, B, A.
  const pixels = new Uint32Array(image.data.buffer);
  const fill = new Uint32Array(256);
  const line = new Uint32Array(256);
  for (const { id, colour, hidden } of look.segments) {
    if (hidden) continue;
    const rgb = toBgr(colour);
    const opacity = id === look.hover ? Math.min(1, look.opacity + 0.3) : look.opacity;
    fill[id] = ((Math.round(opacity * 255) << 24) | rgb) >>> 0;
    line[id] = (0xff000000 | rgb) >>> 0;
  }
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      const id = labels[at];
      const edge = (x > 0 && labels[at - 1] !== id) || (x < width - 1 && labels[at + 1] !== id)
        || (y > 0 && labels[at - width] !== id) || (y < height - 1 && labels[at + width] !== id);
      pixels[at] = edge ? line[id] : fill[id];
    }
  }
  if (look.selection.size > 0) outlineSelected(pixels, labels, height, width, look.selection);
  return image;
}

/** A white line along the inner edge of each selected segment and a dark line next to it, visible on any background. */
function outlineSelected(pixels, labels, height, width, selection) {
  const selected = new Uint8Array(256);
  for (const id of selection) selected[id] = 1;
  const thick = Math.max(2, Math.round(height / 160));
  const depth = depths(labels, height, width, selected);
  for (let at = 0; at < pixels.length; at++) {
    if (depth[at] === 0 || depth[at] > 2 * thick) continue;
    pixels[at] = depth[at] <= thick ? WHITE : DARK;
  }
}

/** Steps (along rows and columns) from each selected pixel to the outside of its segment; 0 where not selected. */
function depths(labels, height, width, selected) {
  const depth = new Uint16Array(labels.length);
  const from = (at, other, inside) => (inside && labels[other] === labels[at] ? depth[other] + 1 : 1);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (selected[labels[at]]) depth[at] = Math.min(from(at, at - 1, x > 0), from(at, at - width, y > 0));
    }
  }
  for (let y = height - 1, at = labels.length - 1; y >= 0; y--) {
    for (let x = width - 1; x >= 0; x--, at--) {
      if (!selected[labels[at]]) continue;
      const back = Math.min(from(at, at + 1, x < width - 1), from(at, at + width, y < height - 1));
      depth[at] = Math.min(depth[at], back);
    }
  }
  return depth;
}

/** Convert "#e69f00" to 0x009fe6, the order of bytes in memory. */
function toBgr(colour) {
  const rgb = parseInt(colour.slice(1), 16);
  return ((rgb & 0xff) << 16) | (rgb & 0xff00) | (rgb >> 16);
}
