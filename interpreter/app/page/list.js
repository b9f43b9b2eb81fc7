// The list of segments. It makes every action of a click on a picture possible with the keyboard.

import { byId, make, percent, setText } from "./dom.js";
import { segmentName, state, update } from "./state.js";

/**
 * Update the rows of a list for the segments. Rows are kept by id, because a new row would lose the focus.
 * @param {HTMLElement} list
 * @param {import("./state.js").Segment[]} segments
 * @param {(segment: import("./state.js").Segment) => HTMLElement} makeRow
 * @param {(row: any, segment: import("./state.js").Segment) => void} renderRow
 */
function renderRows(list, segments, makeRow, renderRow) {
  const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
  segments.forEach((segment, index) => {
    const id = String(segment.id);
    const row = rows.get(id) ?? makeRow(segment);
    rows.delete(id);
    row.dataset.id = id;
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
    renderRow(row, segment);
  });
  for (const row of rows.values()) row.remove();
}

/** Select only this segment, or add it to the selection. A second click deselects it. */
export function toggle(id, adds) {
  const chosen = state.selection.has(id) && (adds || state.selection.size === 1);
  const selection = new Set(adds ? state.selection : []);
  if (chosen) selection.delete(id);
  else selection.add(id);
  update({ selection });
}

/** @param {(kind: "hide"|"show", ids: number[]) => void} edit */
export function renderSegmentList(edit) {
  const makeRow = ({ id }) => {
    const box = make("input", { type: "checkbox", id: `segment-${id}`, "aria-describedby": `segment-area-${id}` });
    box.addEventListener("change", () => toggle(id, true));
    const eye = make("button", { type: "button", className: "small" });
    eye.addEventListener("click", () => {
      const segment = state.server.panes.main?.segments.find((one) => one.id === id);
      if (segment) edit(segment.hidden ? "show" : "hide", [id]);
    });
    const chip = make("span", { className: "chip" });
    const label = make("label", { for: box.id }, chip, make("span", { className: "name" }));
    const area = make("span", { className: "area", id: `segment-area-${id}` });
    const row = make("li", {}, box, label, area, eye);
    row.addEventListener("pointerenter", () => update({ hover: id }));
    row.addEventListener("pointerleave", () => update({ hover: null }));
    row.addEventListener("focusin", () => update({ hover: id }));
    row.addEventListener("focusout", () => update({ hover: null }));
    return row;
  };
  const renderRow = (row, segment) => {
    const [box, label, area, eye] = row.children;
    const name = segmentName(segment);
    box.checked = state.selection.has(segment.id);
    label.firstChild.style.backgroundColor = segment.colour;
    setText(label.lastChild, name);
    setText(area, percent(segment.area));
    setText(eye, segment.hidden ? "Show" : "Hide");
    eye.setAttribute("aria-label", `${segment.hidden ? "Show" : "Hide"} ${name}`);
    row.classList.toggle("off", segment.hidden);
    row.classList.toggle("chosen", box.checked);
    row.classList.toggle("pointed", state.hover === segment.id);
  };
  renderRows(byId("segment-list"), state.server.panes.main?.segments ?? [], makeRow, renderRow);
}

/** A list without controls. */
export function renderLegend(list, segments) {
  const makeRow = () => make("li", {}, make("span", { className: "chip" }), make("span", { className: "name" }),
    make("span", { className: "area" }));
  renderRows(list, segments, makeRow, (row, segment) => {
    const [chip, name, area] = row.children;
    chip.style.backgroundColor = segment.colour;
    setText(name, segmentName(segment) + (segment.hidden ? " (hidden)" : ""));
    setText(area, percent(segment.area));
  });
}
