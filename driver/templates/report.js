"use strict";

// Part of report.html.j2. What it draws stands in the element "data"; names in there come from
// models and may hold anything, so they become text nodes, or pass through label() for plotly.

const DATA = JSON.parse(document.getElementById("data").textContent);
const REPORT = DATA.report;
const STUDY = REPORT.study;
const LAYERS = STUDY.layers;
const CONFIG = {
  displaylogo: false,
  showSendToCloud: false,
  responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d"],
};
const LONGEST_NAME = 26; // characters of a layer's name beside a chart; a hover shows all
// Colours that people with any colour vision tell apart (Okabe and Ito, 2008).
const BLUE = "#0072B2";
const GREEN = "#009E73";
const RED = "#D55E00";
const GREY = "#8a929c";
const BLACK = "#000000";
const PART_COLORS = [BLUE, "#E69F00"];
// Viridis, which grows darker with more bits: the order is seen without colours too.
const BIT_COLORS = ["#fde725", "#35b779", "#31688e", "#440154"];

const POINTS = new Map();
for (const [role, points] of [
  ["", REPORT.others],
  ["baseline", STUDY.baselines],
  ["front", STUDY.front],
]) {
  for (const point of points) {
    const precisions = point.precisions ?? LAYERS.map((name) => point.plan[name]);
    POINTS.set(point.number, { ...point, role, precisions, shown: DATA.shown[point.number] });
  }
}
const FRONT = STUDY.front.map(({ number }) => POINTS.get(number));
let selected = REPORT.best;

// -- helpers ----------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function row(className, heading, ...cells) {
  return element("tr", className, element("th", "", heading), ...cells);
}

// A text that plotly shows as it is: no markup, no field of a template.
function label(text) {
  const plain = text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return plain.replaceAll("%{", "%\u200b{");
}

function shortName(name) {
  const half = LONGEST_NAME / 2;
  return name.length <= LONGEST_NAME ? name : `${name.slice(0, half - 1)}…${name.slice(-half)}`;
}

// The layers from top to bottom; they are numbered, as names may be equal when shortened.
function layerAxis() {
  return {
    tickvals: LAYERS.map((_, index) => index),
    ticktext: LAYERS.map((name) => label(shortName(name))),
    range: [LAYERS.length - 0.5, -0.5],
    automargin: true,
    showgrid: false,
    zeroline: false,
  };
}

function layout(height, more) {
  return { template: DATA.template, height, margin: { t: 40, r: 20, b: 60, l: 70 }, ...more };
}

function nameOf(point) {
  const called = DATA.labels[point.number];
  return called === undefined ? `#${point.number}` : `#${point.number} (${called})`;
}

// -- the front --------------------------------------------------------------------------------

function axisOf(objective) {
  if (objective.unit === "bytes") return { title: `${objective.name} (KiB)`, factor: 1 / 1024 };
  const unit = objective.unit ? ` (${objective.unit})` : "";
  return { title: label(objective.name + unit), factor: 1 };
}

function hover(point) {
  const values = STUDY.objectives.map(({ name }) => `${name} ${point.shown.values[name]}`);
  const precisions =
    LAYERS.length <= 8
      ? LAYERS.map((name, index) => `${shortName(name)} ${point.precisions[index]}`)
      : [point.shown.plan];
  return [nameOf(point), ...values, ...precisions].map(label).join("<br>");
}

// Where a point stands on the axis (0: x, 1: y) as it is chosen.
function place(point, axis) {
  const objective = chosenObjectives()[axis];
  const value = point.objectives[objective.name];
  return value === null ? null : value * axisOf(objective).factor;
}

function chosenObjectives() {
  return ["x-axis", "y-axis"].map((id) => STUDY.objectives[byId(id).value]);
}

function drawFront() {
  const [x, y] = chosenObjectives();
  const axes = [axisOf(x), axisOf(y)];
  const trace = (name, points, more) => ({
    type: "scatter",
    mode: "markers",
    name,
    x: points.map((point) => place(point, 0)),
    y: points.map((point) => place(point, 1)),
    customdata: points.map((point) => point.number),
    hovertext: points.map(hover),
    hoverinfo: "text",
    ...more,
  });
  const all = [...POINTS.values()];
  const baselines = all.filter((point) => point.number in DATA.labels);

  const lines = [];
  const addLine = (name, at, text, dash) => {
    for (const axis of [0, 1]) {
      if ([x, y][axis].name === name) lines.push({ axis, at: at * axes[axis].factor, text, dash });
    }
  };
  addLine(REPORT.error.name, STUDY.float_error, "float model", "dot");
  for (const limit of REPORT.limits) addLine(limit.name, limit.value, limit.text, "dash");

  // The view holds the front and the baselines that are no worse than all of it; lines where they
  // are near. All of a far larger error would make the front a dot.
  const errors = [STUDY.float_error, ...FRONT.map((point) => point.objectives[REPORT.error.name])];
  const near = baselines.filter((point) => {
    const error = point.objectives[REPORT.error.name];
    return error >= Math.min(...errors) && error <= Math.max(...errors);
  });
  const view = [0, 1].map((axis) => {
    let values = [...FRONT, ...near].map((point) => place(point, axis));
    const width = (all) => Math.max(...all) - Math.min(...all);
    for (const line of lines.filter((entry) => entry.axis === axis)) {
      if (width([...values, line.at]) <= 5 * width(values)) values = [...values, line.at];
    }
    const margin = 0.07 * width(values) || 0.07 * Math.abs(values[0]) || 1;
    return [Math.min(...values) - margin, Math.max(...values) + margin];
  });
  const isOutside = (at, axis) => at < view[axis][0] || at > view[axis][1];
  const outside = [
    ...lines.filter(({ at, axis }) => isOutside(at, axis)).map(({ text }) => text),
    ...baselines
      .filter((point) => [0, 1].some((axis) => isOutside(place(point, axis), axis)))
      .map(nameOf),
  ];
  byId("outside").textContent = outside.length
    ? `Outside the view (a double click shows them): ${outside.join(", ")}.`
    : "";

  const traces = [
    trace(
      "other plans that meet the limits",
      all.filter((point) => point.role === ""),
      { marker: { color: GREY, size: 5, opacity: 0.35 } },
    ),
    trace("baselines", baselines, {
      mode: "markers+text",
      text: baselines.map((point) => DATA.labels[point.number]),
      textposition: baselines.map((_, index) => (index % 2 ? "bottom center" : "top center")),
      textfont: { size: 10 },
      marker: { symbol: "diamond-open", color: BLACK, size: 10 },
    }),
    trace("front", FRONT, { marker: { color: BLUE, size: 9 } }),
  ];
  const shapes = lines.map(({ axis, at, dash }) => ({
    type: "line",
    xref: axis ? "paper" : "x",
    yref: axis ? "y" : "paper",
    [axis ? "x0" : "y0"]: 0,
    [axis ? "x1" : "y1"]: 1,
    [axis ? "y0" : "x0"]: at,
    [axis ? "y1" : "x1"]: at,
    line: { dash, color: BLACK, width: 1 },
  }));
  const annotations = lines.map(({ axis, at, text }) => ({
    xref: axis ? "paper" : "x",
    yref: axis ? "y" : "paper",
    [axis ? "x" : "y"]: axis ? 1.01 : 0.99,
    [axis ? "y" : "x"]: at,
    xanchor: axis ? "left" : "right",
    yanchor: axis ? "middle" : "top",
    text: label(text),
    textangle: axis ? 0 : -90,
    showarrow: false,
  }));
  Plotly.react(
    "front",
    traces,
    layout(600, {
      hovermode: "closest",
      uirevision: `${x.name} ${y.name}`, // a zoom stays while the axes are the same
      margin: { t: 40, r: 90, b: 60, l: 70 },
      xaxis: { title: { text: axes[0].title }, range: view[0], zeroline: false },
      yaxis: { title: { text: axes[1].title }, range: view[1], zeroline: false },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      shapes,
      annotations,
    }),
    CONFIG,
  );
  markFront();
}

// Put a ring around the shown plan: a shape, as that is moved without drawing all points again.
function markFront() {
  const point = POINTS.get(selected);
  const ring = {
    type: "circle",
    xsizemode: "pixel",
    ysizemode: "pixel",
    xanchor: place(point, 0),
    yanchor: place(point, 1),
    x0: -9,
    x1: 9,
    y0: -9,
    y1: 9,
    line: { color: BLACK, width: 2 },
  };
  const lines = byId("front").layout.shapes.filter(({ type }) => type === "line");
  Plotly.relayout("front", { shapes: [...lines, ring] });
}

// -- one plan ---------------------------------------------------------------------------------

function drawPlan() {
  const point = POINTS.get(selected);
  const cell = (text) => element("td", "number", text);
  const named = `#${point.number}`;
  byId("number").textContent = named;
  byId("number-again").textContent = named;
  byId("choice").value = point.number;
  const where = point.role === "front" ? "On the front" : "Not on the front";
  byId("role").textContent = `${where}: ${DATA.labels[point.number] ?? point.shown.plan}`;
  const error = point.shown.values[REPORT.error.name] ?? "-";
  byId("errors").replaceChildren(
    row("objective", "this plan", ...[error, ...point.shown.errors].map(cell)),
    row("", "float model", ...DATA.float_errors.map(cell)),
  );
  const objectives = new Set(STUDY.objectives.map((objective) => objective.name));
  byId("gains").replaceChildren(
    ...Object.entries(REPORT.gains).map(([name, gain]) =>
      row(
        objectives.has(name) ? "objective" : "",
        name.replaceAll("_", " "),
        cell(point.shown.values[name] ?? "-"),
        element("td", "soft", gain.summary),
      ),
    ),
  );
  byId("layers").replaceChildren(
    ...LAYERS.map((name, index) => row("", name, element("td", "", point.precisions[index]))),
  );
  byId("command").textContent = command(point);
}

function command(point) {
  const [before, behind] = DATA.compile;
  return before + point.number + behind + point.number;
}

function planJson(point) {
  const layers = Object.fromEntries(LAYERS.map((name, index) => [name, point.precisions[index]]));
  return `${JSON.stringify({ ...DATA.plan, layers }, null, 2)}\n`;
}

async function copy(text) {
  const area = byId("copy-text");
  let done = true;
  area.hidden = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Not every browser lets a page from a file write to the clipboard.
    area.value = text;
    area.hidden = false;
    area.select();
    done = document.execCommand("copy");
  }
  byId("copied").textContent = done ? "copied" : "copy the selected text below";
}

// What a layer costs, where the cost model defines it.
const QUANTITIES = [
  {
    title: "cycles",
    needs: "stall_cycles",
    parts: { compute: (cost) => cost.cycles - cost.stall_cycles, stalls: (c) => c.stall_cycles },
  },
  { title: "cycles", needs: "cycles", unless: "stall_cycles", parts: { cycles: (c) => c.cycles } },
  {
    title: "relative cycles",
    needs: "relative_cycles",
    unless: "cycles",
    parts: { cycles: (cost) => cost.relative_cycles },
  },
  { title: "energy (uJ)", needs: "energy_pj", parts: { energy: (cost) => cost.energy_pj / 1e6 } },
  {
    title: "external memory (KiB)",
    needs: "dram_read_bits",
    parts: {
      read: (cost) => cost.dram_read_bits / 8192,
      written: (cost) => cost.dram_write_bits / 8192,
    },
  },
  {
    title: "weights (KiB)",
    needs: "weight_bits",
    parts: { weights: (cost) => cost.weight_bits / 8192 },
  },
];

function drawCosts() {
  const point = POINTS.get(selected);
  const costs = LAYERS.map((name, index) => REPORT.layer_costs[name][point.precisions[index]]);
  const has = (quantity) => costs.every((cost) => quantity in cost);
  const charts = QUANTITIES.filter(({ needs, unless }) => has(needs) && !(unless && has(unless)));
  const traces = [];
  const axes = {};
  charts.forEach(({ title, parts }, column) => {
    const number = column ? column + 1 : "";
    const width = 1 / charts.length;
    const names = Object.keys(parts).map(
      (name, index) => `<span style="color:${PART_COLORS[index]}">■</span> ${name}`,
    );
    axes[`xaxis${number}`] = {
      title: { text: `${title}<br>${names.length > 1 ? names.join(" ") : ""}` },
      domain: [column * width + (column ? 0.02 : 0), (column + 1) * width - 0.01],
      rangemode: "tozero",
      nticks: 4,
    };
    Object.entries(parts).forEach(([name, part], index) => {
      const values = costs.map(part);
      traces.push({
        type: "bar",
        orientation: "h",
        name,
        x: values,
        y: LAYERS.map((_, layer) => layer),
        xaxis: `x${number}`,
        marker: { color: PART_COLORS[index] },
        hovertext: LAYERS.map((layer, at) =>
          label(`${layer}, ${point.precisions[at]}: ${name} ${values[at].toPrecision(4)}`),
        ),
        hoverinfo: "text",
      });
    });
  });
  Plotly.react(
    "costs",
    traces,
    layout(Math.max(20 * LAYERS.length, 160) + 100, {
      barmode: "stack",
      bargap: 0.25,
      showlegend: false,
      yaxis: layerAxis(),
      ...axes,
    }),
    CONFIG,
  );
}

// -- precisions along the front ---------------------------------------------------------------

function drawPrecisions() {
  const bits = FRONT.map((point) =>
    point.precisions.map((text) => /^w(\d+)a(\d+)$/.exec(text).slice(1).map(Number)),
  );
  const equal = bits.flat().every(([weights, activations]) => weights === activations);
  const panels = equal ? ["weights and activations"] : ["weights", "activations"];
  const colorscale = BIT_COLORS.flatMap((color, index) => [
    [index / BIT_COLORS.length, color],
    [(index + 1) / BIT_COLORS.length, color],
  ]);
  const every = Math.ceil(FRONT.length / 24); // no more numbers than can be read
  const ticks = FRONT.map((_, index) => index).filter((index) => index % every === 0);
  const plans = FRONT.map(hover);
  const axes = {};
  const traces = panels.map((title, panel) => {
    const number = panel ? 2 : "";
    axes[`xaxis${number}`] = {
      title: { text: title },
      domain: equal ? [0, 1] : [panel * 0.51, panel * 0.51 + 0.49],
      range: [-0.5, FRONT.length - 0.5],
      tickvals: ticks,
      ticktext: ticks.map((index) => `#${FRONT[index].number}`),
      tickangle: -90,
      showgrid: false,
      zeroline: false,
    };
    const values = LAYERS.map((_, layer) => bits.map((plan) => plan[layer][panel]));
    return {
      type: "heatmap",
      xaxis: `x${number}`,
      z: values.map((entries) => entries.map((width) => DATA.widths.indexOf(width))),
      text: values,
      texttemplate: FRONT.length <= 40 ? "%{text}" : "",
      hovertext: LAYERS.map((name, layer) =>
        FRONT.map((point, at) => `${label(`${name}: ${point.precisions[layer]}`)}<br>${plans[at]}`),
      ),
      hoverinfo: "text",
      zmin: -0.5,
      zmax: DATA.widths.length - 0.5,
      colorscale,
      showscale: false,
      xgap: 1,
      ygap: 1,
    };
  });
  Plotly.react(
    "precisions",
    traces,
    layout(Math.max(22 * LAYERS.length, 130) + 130, {
      yaxis: layerAxis(),
      margin: { t: 10, r: 20, b: 100, l: 70 },
      ...axes,
    }),
    CONFIG,
  );
}

function markPrecisions() {
  const at = FRONT.findIndex((point) => point.number === selected);
  const panels = at < 0 ? [] : byId("precisions").data;
  const shapes = panels.map(({ xaxis }) => ({
    type: "rect",
    xref: xaxis,
    yref: "paper",
    x0: at - 0.5,
    x1: at + 0.5,
    y0: 0,
    y1: 1,
    line: { color: RED, width: 3 },
  }));
  Plotly.relayout("precisions", { shapes });
}

// -- the page ---------------------------------------------------------------------------------

function select(number) {
  selected = number;
  drawPlan();
  drawCosts();
  markFront();
  markPrecisions();
}

function begin() {
  const choose = (id, options, chosen) => {
    for (const [value, text] of options) {
      byId(id).append(new Option(text, value, false, value === chosen));
    }
  };
  const axes = STUDY.objectives.map(({ name }, index) => [index, name]);
  const error = axes.findIndex(([, name]) => name === REPORT.error.name);
  const gain = axes.findIndex(([, name]) => name !== REPORT.error.name);
  choose("x-axis", axes, gain);
  choose("y-axis", axes, error < 0 ? 1 : error);
  const points = FRONT.map(({ number, shown }) => {
    const values = STUDY.objectives.map(({ name }) => shown.values[name]);
    return [number, `#${number}: ${values.join(", ")}`];
  });
  choose("choice", points, selected);
  DATA.widths.forEach((width, index) => {
    const swatch = element("span", "swatch");
    swatch.style.background = BIT_COLORS[index];
    byId("bits").append(swatch, `${width}`);
  });
  drawFront();
  drawPrecisions();
  select(selected);
  byId("x-axis").onchange = drawFront;
  byId("y-axis").onchange = drawFront;
  byId("choice").onchange = (event) => select(Number(event.target.value));
  byId("front").on("plotly_click", ({ points: [point] }) => select(point.customdata));
  byId("precisions").on("plotly_click", ({ points: [point] }) =>
    select(FRONT[point.x].number),
  );
  byId("copy-plan").onclick = () => copy(planJson(POINTS.get(selected)));
  byId("copy-command").onclick = () => copy(command(POINTS.get(selected)));
}

if (REPORT.best !== null) begin();
if (DATA.sensitivity !== null) {
  Plotly.newPlot("sensitivity", DATA.sensitivity.data, DATA.sensitivity.layout, CONFIG);
}
if (REPORT.generations.length) {
  const generations = REPORT.generations;
  const convergence = {
    type: "scatter",
    mode: "lines+markers",
    x: generations.map((generation) => generation.evaluations),
    y: generations.map((generation) => generation.hypervolume),
    hovertext: generations.map(
      ({ number, evaluations, hypervolume, seconds }) =>
        `generation ${number}<br>${evaluations} evaluations<br>` +
        `hypervolume ${hypervolume.toFixed(4)}<br>${seconds.toFixed(1)} s`,
    ),
    hoverinfo: "text",
    marker: { color: GREEN, size: 5 },
    line: { color: GREEN },
  };
  Plotly.newPlot(
    "convergence",
    [convergence],
    layout(320, {
      xaxis: { title: { text: "evaluations" } },
      yaxis: { title: { text: "hypervolume" } },
    }),
    CONFIG,
  );
}

// Charts as wide as a sheet of paper (A4 or Letter) while the page is printed.
const PAPER = 700; // pixels
addEventListener("beforeprint", () => resize({ width: PAPER, autosize: false }));
addEventListener("afterprint", () => resize({ width: null, autosize: true }));

function resize(size) {
  for (const chart of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(chart, size);
}
