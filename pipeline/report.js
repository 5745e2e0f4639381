"use strict";

// Growth: plays the frames once through; the slider goes to any of them.
for (const player of document.querySelectorAll(".player")) {
  const frames = [...player.querySelectorAll("img")];
  const [button, slider, output] = ["button", "input", "output"].map((tag) => player.querySelector(tag));
  let timer = 0;
  const show = (index) => {
    frames.forEach((frame, i) => frame.classList.toggle("on", i === index));
    slider.value = index;
    output.textContent = `${frames[index].dataset.images} images`;
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    player.classList.remove("playing");
    button.setAttribute("aria-label", "Play");
  };
  const step = () => {
    const next = Number(slider.value) + 1;
    if (next < frames.length) show(next);
    if (next + 1 >= frames.length) stop();
  };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === frames.length - 1) show(0);
    timer = setInterval(step, Math.max(160, 4000 / frames.length));
    player.classList.add("playing");
    button.setAttribute("aria-label", "Pause");
  });
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
}

// Charts: under the pointer, the legend shows the values there instead of the latest ones.
for (const figure of document.querySelectorAll(".chart")) {
  const { lines, right, digits, suffix } = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const cursor = plot.querySelector("i");
  const output = figure.querySelector("output");
  const values = [...figure.querySelectorAll(".legend b")];
  const latest = values.map((value) => value.textContent);
  const text = (v) => v === null ? "–"
    : v.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }) + suffix;
  const nearest = (x, at) => {
    let best = 0;
    x.forEach((value, i) => { if (Math.abs(value - at) < Math.abs(x[best] - at)) best = i; });
    return best;
  };
  const every = lines.flatMap((line) => line.x);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = every[nearest(every, (event.clientX - box.left) / box.width * right)];
    cursor.style.display = "block";
    cursor.style.left = `${100 * at / right}%`;
    output.textContent = `at ${at.toLocaleString("en-US")} images`;
    lines.forEach(({ x, y }, i) => {
      const there = x.length && x[0] <= at && at <= x[x.length - 1];  // a shorter run has ended before
      values[i].textContent = text(there ? y[nearest(x, at)] : null);
    });
  });
  plot.addEventListener("pointerleave", () => {
    cursor.style.display = "none";
    output.textContent = "";
    values.forEach((value, i) => { value.textContent = latest[i]; });
  });
}
