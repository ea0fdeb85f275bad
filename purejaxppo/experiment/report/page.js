// Draws the plots of the page, in its colours, and shows the lines that the reader chooses.
"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");
const PRINTED_WIDTH = 660;
const BUTTONS = [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
const plots = [...document.querySelectorAll(".plot")];

function colors(isDark) {
  const [ink, line] = isDark ? ["#e4e7eb", "#3a414b"] : ["#1b1e23", "#d8dce2"];
  const changed = { "font.color": ink, "modebar.color": "#888", "modebar.activecolor": ink };
  for (const axis of ["xaxis", "yaxis"]) {
    changed[`${axis}.gridcolor`] = changed[`${axis}.linecolor`] = line;
  }
  return changed;
}

function draw(plot) {
  const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
  // A finger that moves over a plot scrolls the page; the buttons of the plot still zoom.
  if (touch.matches) layout.dragmode = false;
  const options = { responsive: true, displaylogo: false, modeBarButtons: BUTTONS };
  if (touch.matches) options.displayModeBar = true;
  return Plotly.newPlot(plot, data, layout, options).then(() => Plotly.relayout(plot, colors(dark.matches)));
}

function choose(form) {
  const plot = form.parentElement.querySelector(".plot");
  const excluded = new Set();
  for (const box of form.querySelectorAll("[type=checkbox][data-field]:not(:checked)")) excluded.add(box.dataset.field);
  const ends = [...form.querySelectorAll("[type=number][data-field]")].filter((end) => end.value !== "");
  const isOutside = (values) =>
    ends.some((end) => {
      const beyond = Number(values[end.dataset.field]) - Number(end.value);
      return end.className === "low" ? beyond < 0 : beyond > 0;
    });
  let left = Number(form.querySelector(".most").value) || 1;
  const shown = [...form.querySelectorAll("li")].map((item) => {
    const values = item.dataset.values.split(" ").filter(Boolean);
    const isExcluded = values.some((value, field) => excluded.has(`${field} ${value}`));
    item.hidden = left < 1 || isExcluded || isOutside(values);
    left -= item.hidden ? 0 : 1;
    return !item.hidden && item.querySelector("input").checked;
  });
  const intervals = form.querySelector(".intervals").checked;
  const visible = plot.data.map((trace) => shown[trace.meta] && (intervals || trace.fill !== "toself"));
  Plotly.restyle(plot, { visible });
}

for (const plot of plots) draw(plot);
for (const form of document.querySelectorAll(".choice")) {
  form.addEventListener("input", () => choose(form));
  form.addEventListener("submit", (event) => event.preventDefault());
  choose(form);
}
dark.addEventListener("change", () => plots.forEach((plot) => Plotly.relayout(plot, colors(dark.matches))));
addEventListener("beforeprint", () => {
  for (const plot of plots) {
    const width = Math.min(plot.clientWidth, PRINTED_WIDTH);
    Plotly.relayout(plot, { ...colors(false), width });
  }
  for (const folded of document.querySelectorAll("details:not([open])")) {
    folded.open = true;
    addEventListener("afterprint", () => (folded.open = false), { once: true });
  }
});
addEventListener("afterprint", () => {
  for (const plot of plots) Plotly.relayout(plot, { ...colors(dark.matches), width: null, autosize: true });
});
