// The progress bar of a prompt; between the server's reports it moves on by its last prediction.

import { make, number, seconds } from "./format.js";

export class Reading {
  constructor(turn) {
    this.bar = make("div", { className: "bar", role: "progressbar", ariaLabel: "Reading the prompt",
      ariaValueMin: "0", ariaValueMax: "100", ariaValueNow: "0" }, make("div"));
    this.row = make("div", { className: "row" }, make("span"), make("span"));
    this.box = make("div", { className: "reading" }, this.bar, this.row);
    turn.insertBefore(this.box, turn.children[1]);
    this.start = performance.now();
    this.expectedMs = 0;
    this.from = { share: 0, at: this.start };
    this.shown = 0; // never goes back, even where a prediction was too good
    this.timer = setInterval(() => this.draw(), 100);
    this.label("Sending", "");
  }

  update(progress, expectedMs) {
    const { total, cache, processed } = progress;
    const share = total > cache ? Math.max(0, processed - cache) / (total - cache) : 1;
    this.progress = progress;
    this.expectedMs = expectedMs;
    this.from = { share: Math.max(share, this.shown), at: performance.now() };
    this.draw();
  }

  draw() {
    if (!this.progress) return;
    const now = performance.now();
    const left = this.expectedMs ? this.start + this.expectedMs - this.from.at : 0;
    const gone = left > 0 ? Math.min(0.95, (now - this.from.at) / left) : 0;
    const share = this.shown = this.from.share + (1 - this.from.share) * gone;
    const leftMs = this.expectedMs ? this.start + this.expectedMs - now : null;
    this.bar.firstChild.style.width = `${100 * share}%`;
    this.bar.ariaValueNow = String(Math.round(100 * share));
    const { total, cache } = this.progress;
    this.label(`Reading ${number(total)} tokens` + (cache ? `, ${number(cache)} from cache` : "")
      + ` · ${Math.floor(100 * share)} %`,
      leftMs === null ? "" : leftMs > 100 ? `about ${seconds(leftMs)} left` : "any moment");
  }

  label(left, right) {
    this.row.firstChild.textContent = left;
    this.row.lastChild.textContent = right;
  }

  close() {
    clearInterval(this.timer);
    this.box.remove();
  }
}
