"use strict";
(async () => {
  const root = document.documentElement;
  const inflate = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const data = JSON.parse(await inflate("data"));
  const library = document.createElement("script");
  library.textContent = await inflate("library");
  document.head.append(library);

  // The neutral colour of a diverging scale is close to the background.
  const scales = {
    light: { diverging: [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f2f2f2"], [0.75, "#f4a582"], [1, "#b2182b"]],
             amount: [[0, "#f4f6fa"], [1, "#1f3b8a"]] },
    dark: { diverging: [[0, "#6db3f2"], [0.25, "#2f5f8a"], [0.5, "#2a2e36"], [0.75, "#94453a"], [1, "#ff8a70"]],
            amount: [[0, "#20242c"], [1, "#9db7ff"]] },
  };
  const darkScreen = window.matchMedia("screen and (prefers-color-scheme: dark)");
  let printing = false;
  const theme = () => (darkScreen.matches && !printing ? "dark" : "light");

  const looks = (chart) => {
    const name = theme();
    const look = { template: data.templates[name === "dark" ? "plotly_dark" : "plotly_white"],
                   paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    for (const axis of Object.keys(chart.layout).filter((key) => key.startsWith("coloraxis")))
      look[`${axis}.colorscale`] = scales[name][chart.layout.meta.scale[axis]];
    return look;
  };

  // A cube holds one byte per step, row and column: 0 for nothing there, 1 for no tokens, else 2 + 253 (x + 4) / 8,
  // where x is the logarithm to base 2 of the load over the mean of its layer.
  const sheet = (cube, step) => {
    const z = [], ratio = [];
    for (let row = 0; row < cube.rows; row++) {
      const start = (step * cube.rows + row) * cube.columns;
      const bytes = Array.from(cube.bytes.subarray(start, start + cube.columns));
      const logs = bytes.map((b) => (b === 0 ? null : b === 1 ? -cube.limit : ((b - 2) / 253) * 8 - 4));
      z.push(logs);
      ratio.push(bytes.map((b, i) => (b === 0 ? null : b === 1 ? 0 : 2 ** logs[i])));
    }
    return { z: [z], customdata: [ratio] };
  };

  const drawn = new Map();
  const draw = (element) => {
    if (drawn.has(element.id)) return drawn.get(element.id);
    const chart = data.charts[element.id];
    const task = (async () => {
      if (chart.cube) {
        chart.cube.bytes = Uint8Array.from(atob(chart.cube.content), (c) => c.charCodeAt(0));
        const first = sheet(chart.cube, chart.cube.steps - 1);
        chart.data[0].z = first.z[0];
        chart.data[0].customdata = first.customdata[0];
      }
      await Plotly.newPlot(element, chart.data, chart.layout, { responsive: true, displaylogo: false, displayModeBar: "hover" });
      await Plotly.relayout(element, looks(chart));
      if (chart.cube)
        element.on("plotly_sliderchange", (event) =>
          Plotly.restyle(element, sheet(chart.cube, Number(event.step.value)), [0]));
      element.dataset.drawn = "yes";
    })();
    drawn.set(element.id, task);
    return task;
  };

  const elements = [...document.querySelectorAll(".chart")];
  const follow = () => {
    for (const element of elements)
      if (element.dataset.drawn) Plotly.relayout(element, looks(data.charts[element.id]));
  };
  darkScreen.addEventListener("change", follow);
  window.addEventListener("beforeprint", () => {
    printing = true;
    for (const closed of document.querySelectorAll("details:not([open])")) { closed.open = true; closed.dataset.was = "closed"; }
    for (const element of elements) draw(element);
    follow();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    for (const opened of document.querySelectorAll("details[data-was]")) { opened.open = false; delete opened.dataset.was; }
    follow();
  });
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "300px" });
  for (const element of elements) seen.observe(element);
  root.dataset.ready = "yes";
})();
