// The settings of the model. The server lists them. A change computes the segments again.

import { ask } from "./ask.js";
import { byId, make, setShown, setText } from "./dom.js";
import { startJob } from "./job.js";
import { state, update } from "./state.js";

const START_AGAIN = "Changing this setting discards your corrections; Undo cannot bring them back.";
const ANEW = "Changing this encodes the video again, which takes as long as the first time.";
const UNTOUCHED = "as in training";
/** Each press of an arrow key changes a range by one step. Several steps become one request. */
const PAUSE = 500;

let timer = 0;
let paused = false;
let sending = false;
/** @type {Map<string, {root: HTMLElement, render: (control: import("./state.js").Control) => void}>} */
const rows = new Map();
let built = "";

/** All settings: those of the pane, with the later changes of the user. */
export function settings(pane) {
  const values = {};
  for (const { name, value } of pane.controls) values[name] = name in state.draft ? state.draft[name] : value;
  return values;
}

async function change(name, value) {
  const pane = state.server.panes.main;
  const asked = Object.keys(state.draft).length > 0;
  const answers = { yes: "Change the setting", no: "Keep my corrections" };
  if (pane.undo && !asked && !(await ask(START_AGAIN, answers))) return update({});
  update({ draft: { ...state.draft, [name]: value }, draftSent: false });
  clearTimeout(timer);
  paused = true;
  timer = setTimeout(() => {
    paused = false;
    sendChanges();
  }, PAUSE);
  return undefined;
}

/** Send the changes. While a job runs, send nothing: its end calls this function again. */
export async function sendChanges() {
  const pane = state.server.panes.main;
  const waits = paused || sending || state.draftSent || state.server.job !== null;
  if (waits || !pane || Object.keys(state.draft).length === 0) return;
  sending = true;
  state.draftSent = true;
  const body = { source: pane.source, settings: settings(pane) };
  if (!(await startJob("segment", body))) update({ draft: {}, draftSent: false });
  sending = false;
}

export function startControls() {
  for (const id of ["opacity", "compare-opacity"]) {
    byId(id).addEventListener("input", (event) => update({ opacity: Number(event.target.value) }));
  }
}

export function renderOpacity() {
  for (const id of ["opacity", "compare-opacity"]) {
    const text = `${Math.round(state.opacity * 100)} %`;
    byId(id).value = String(state.opacity);
    byId(id).setAttribute("aria-valuetext", text);
    setText(byId(`${id}-value`), text);
  }
}

export function renderControls() {
  const pane = state.server.panes.main;
  if (!pane) return;
  const signature = JSON.stringify([pane.source, pane.controls.map((control) => ({ ...control, value: null }))]);
  if (signature !== built) {
    built = signature;
    rows.clear();
    for (const control of pane.controls) {
      rows.set(control.name, control.kind === "range" ? range(control) : choice(control));
    }
    byId("controls").replaceChildren(...[...rows.values()].map(({ root }) => root));
  }
  const values = settings(pane);
  for (const control of pane.controls) rows.get(control.name).render({ ...control, value: values[control.name] });
  setShown(byId("settings-warning"), pane.undo && pane.controls.length > 0);
}

function frameOf(control, input, ...more) {
  const help = make("p", { id: `help-${control.name}`, className: "quiet" },
    [control.help, control.slow ? ANEW : ""].filter(Boolean).join(" "));
  input.id = `control-${control.name}`;
  input.setAttribute("aria-describedby", help.id);
  const reset = make("button", { type: "button", className: "small", textContent: "Reset" });
  reset.setAttribute("aria-label", `Reset ${control.label}`);
  reset.addEventListener("click", () => change(control.name, null));
  const label = make("label", { for: input.id, textContent: control.label });
  const root = make("div", { className: "control" }, label, ...more, input, reset, help);
  return { root, reset };
}

function range(control) {
  const { min, max, step } = control;
  const input = make("input", { type: "range", min, max, step });
  const shown = make("span", { className: "value" });
  const { root, reset } = frameOf(control, input, shown);
  let moving = false;
  const tell = (text) => {
    setText(shown, text);
    input.setAttribute("aria-valuetext", text);
  };
  input.addEventListener("input", () => {
    moving = true;
    tell(input.value);
  });
  input.addEventListener("change", () => {
    moving = false;
    change(control.name, Number(input.value));
  });
  const render = ({ value }) => {
    reset.disabled = value === null;
    if (moving) return;
    input.value = String(value ?? control.default ?? (min + max) / 2);
    if (value !== null) tell(String(value));
    else tell(control.default === null ? UNTOUCHED : `${control.default} (default)`);
  };
  return { root, render };
}

function choice(control) {
  const input = make("select");
  if (control.default === null) input.append(make("option", { value: "", textContent: UNTOUCHED }));
  for (const { value, label } of control.choices) {
    const text = value === control.default ? `${label} (default)` : label;
    input.append(make("option", { value: String(value), textContent: text }));
  }
  const { root, reset } = frameOf(control, input);
  input.addEventListener("change", () => {
    const chosen = control.choices.find(({ value }) => String(value) === input.value);
    change(control.name, chosen ? chosen.value : null);
  });
  const render = ({ value }) => {
    reset.disabled = value === null;
    input.value = String(value ?? control.default ?? "");
  };
  return { root, render };
}
