// The slider over frames with Play, Previous and Next. Both tabs with pictures have one, and share the frame.

import { make, setText } from "./dom.js";
import { state, update } from "./state.js";

export class Player {
  /** @param {HTMLElement} root @param {import("./view.js").View} view */
  constructor(root, view) {
    this.view = view;
    this.runs = 0;
    const id = `${root.id}-frame`;
    this.previous = make("button", { type: "button", textContent: "Previous", title: "Previous frame" });
    this.play = make("button", { type: "button", className: "play" });
    this.next = make("button", { type: "button", textContent: "Next", title: "Next frame" });
    this.slider = make("input", { id, type: "range", min: "0", step: "1" });
    this.readout = make("span", { className: "readout" });
    const label = make("label", { for: id, textContent: "Frame" });
    root.append(make("div", { className: "buttons" }, this.previous, this.play, this.next),
      make("div", { className: "scrub" }, label, this.slider), this.readout);

    this.slider.addEventListener("input", () => update({ frame: Number(this.slider.value), playing: false }));
    this.previous.addEventListener("click", () => this.go(-1));
    this.next.addEventListener("click", () => this.go(1));
    this.play.addEventListener("click", () => {
      update({ playing: !state.playing });
      if (state.playing) this.run();
    });
  }

  go(step) {
    const frame = state.frame + step;
    if (frame >= 0 && frame < state.server.clip.frames) update({ frame, playing: false });
  }

  /** Show the next frame when it is due and the previous one is on the screen. */
  run() {
    let last = performance.now();
    this.runs += 1;
    const mine = this.runs;
    const tick = (now) => {
      const { clip } = state.server;
      // After quick clicks on Pause and Play, only one loop must run.
      if (mine !== this.runs || !state.playing || !clip || state.tab !== this.view.tab) return;
      const interval = 1000 / (clip.fps || 25);
      if (now - last >= interval - 2 && this.view.isCurrent()) {
        // After waiting for the server, the clip continues at its normal speed.
        last = Math.max(last + interval, now - interval);
        update({ frame: (state.frame + 1) % clip.frames });
      }
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  render() {
    const { clip } = state.server;
    if (!clip) return;
    const last = clip.frames - 1;
    const time = `${(state.frame / (clip.fps || 25)).toFixed(2)} s`;
    const text = `frame ${state.frame + 1} of ${clip.frames}, ${time}`;
    this.slider.max = String(last);
    this.slider.value = String(state.frame);
    this.slider.setAttribute("aria-valuetext", text);
    setText(this.readout, text);
    setText(this.play, state.playing ? "Pause" : "Play");
    this.play.disabled = last === 0;
    this.previous.disabled = state.frame === 0;
    this.next.disabled = state.frame === last;
  }
}
