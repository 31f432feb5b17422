// The trend on the overview.
"use strict";
(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const numbers = (text) => text.split(",").map(Number);

  const day = (options) => new Intl.DateTimeFormat(undefined, { ...options, timeZone: "UTC" });
  const short = day({ day: "numeric", month: "short" });
  const long = day({ dateStyle: "medium" });

  const draw = () => {
    const place = document.querySelector("[data-chart]");
    if (!place || !window.uPlot) return;
    place.replaceChildren();
    const days = place.dataset.days.split(",").map((day) => Date.parse(`${day}T12:00:00Z`) / 1000);
    const positive = numbers(place.dataset.positive);
    const total = numbers(place.dataset.negative).map((n, i) => n + positive[i]);
    const wide = uPlot.paths.bars({ size: [0.78, 22], radius: 0.2 });
    const slim = uPlot.paths.bars({ size: [0.46, 13], radius: 0.2 });
    const half = 43200;
    const axis = {
      stroke: colour("--soft"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
    };
    const one = (label, name, paths) => ({
      label,
      value: (_, n) => n ?? "",
      paths,
      points: { show: false },
      fill: colour(name),
      stroke: colour(name),
      width: 0,
    });
    const chart = new uPlot(
      {
        width: place.clientWidth,
        height: 240,
        tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1e3), "Etc/UTC"),
        scales: {
          x: { range: (_, from, to) => [from - half, to + half] },
          y: { range: (_, __, most) => [0, Math.max(4, Math.ceil(most * 1.1))] },
        },
        axes: [
          { ...axis, grid: { show: false }, values: (_, at) => at.map((s) => short.format(new Date(s * 1e3))), space: 64 },
          { ...axis, size: 44, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 10000] },
        ],
        cursor: { drag: { x: false, y: false }, points: { show: false } },
        series: [
          { label: "", value: (_, at) => (at == null ? "" : long.format(new Date(at * 1e3))) },
          one("Received", "--bar", wide),
          one("Analysed", "--calm", slim),
          one("Positive", "--stat", slim),
        ],
      },
      [days, numbers(place.dataset.received), total, positive],
      place,
    );
    place.chart = chart;
  };

  const fit = () => {
    const place = document.querySelector("[data-chart]");
    place?.chart?.setSize({ width: place.clientWidth, height: 240 });
  };
  draw();
  addEventListener("resize", fit);
  document.addEventListener("themechange", draw);
  document.addEventListener("htmx:afterSettle", draw);
})();
