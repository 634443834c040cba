"use strict";
// What a report shows. Data comes from #data (figures, rows) and from #t-KEY (a trajectory, compressed). Texts in it
// were written by models: they become text nodes, nothing else. No step of this needs a server or a network.

const D = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page"), viewer = document.getElementById("viewer");
const kept = new Set(D.keys);

// ------------------------------------------------------------------ small things

// Control characters, and those that turn, hide or join what stands around them, as their numbers.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e0fff}]/gu;
const visible = (text) => String(text).replace(HIDDEN, (c) => "\\u{" + c.codePointAt(0).toString(16) + "}");

function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
function svg(tag, options = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(options)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
// A text that others wrote.
const theirs = (text, name = "", tag = "span") => el(tag, {class: ("theirs " + name).trim()}, visible(text));

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);
function short(x, digits = 3) {
  if (!isNumber(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-4) return x.toExponential(Math.max(0, digits - 2)).replace("e+", "e");
  if (size >= 1000) return Math.round(x).toLocaleString("en-US");
  return String(Number(x.toPrecision(digits)));
}
const percent = (x, digits = 1) => (isNumber(x) ? (100 * x).toFixed(digits) + " %" : "–");
const signed = (x, digits = 2) => (isNumber(x) ? (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(digits) : "–");
const plural = (n, word) => n.toLocaleString("en-US") + " " + word + (n === 1 ? "" : "s");
function duration(seconds) {
  if (seconds < 90) return Math.round(seconds) + " s";
  if (seconds < 5400) return Math.round(seconds / 60) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}

// What a reader has chosen outlives a reload: by the path of this file, in this tab. (Browsers keep the place.)
const place = "report " + location.pathname;
function remembered() {
  try { return JSON.parse(sessionStorage.getItem(place)) || {}; } catch { return {}; }
}
const state = Object.assign({filter: "all", search: "", sort: "", file: 0, open: []}, remembered());
function remember() {
  state.open = [...document.querySelectorAll("details[open]")].map((d) => d.dataset.name);
  try { sessionStorage.setItem(place, JSON.stringify(state)); } catch { /* private windows have no place */ }
}
addEventListener("pagehide", remember);

function folded(name, title, content) {
  return el("details", {"data-name": name, open: state.open.includes(name)}, el("summary", {}, title), content);
}

// ------------------------------------------------------------------ top of the page

function themeButton() {
  const root = document.documentElement, order = ["auto", "light", "dark"];
  let theme = "auto";
  try { theme = localStorage.getItem("report theme") || "auto"; } catch { /* then for this page only */ }
  const button = el("button", {type: "button", id: "theme", title: "colours: as the system, light, dark"});
  const show = () => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = {auto: "◐ auto", light: "○ light", dark: "● dark"}[theme];
  };
  button.addEventListener("click", () => {
    theme = order[(order.indexOf(theme) + 1) % 3];
    try { localStorage.setItem("report theme", theme); } catch { /* as above */ }
    show();
  });
  show();
  return button;
}

function header(lead) {
  document.title = visible(D.title);
  return el("div", {class: "top"}, el("div", {}, theirs(D.title, "", "h1"), lead), themeButton());
}

function about(rows) {
  const list = el("dl", {class: "about"});
  for (const [name, value] of rows) {
    if (value) list.append(el("dt", {}, name), el("dd", {}, value instanceof Node ? value : theirs(value)));
  }
  return list;
}

const moment = (iso) => visible(String(iso).replace("T", " ").replace(/(:\d\d)?(\+00:00|Z)$/, " UTC"));

function origin(of, suffix = "") {
  const last = of.starts[of.starts.length - 1] || {}, first = of.starts[0] || last;
  const changed = el("span", {class: "changed"});
  for (const [name, value, usual] of of.fields) {
    if (usual !== null) changed.append(el("span", {class: "mono small theirs"}, visible(name) + "=" + visible(value), el("s", {title: "default"}, "  " + visible(usual))));
  }
  const started = first.time ? moment(first.time) + (of.starts.length > 1 ? `, started ${of.starts.length} times, last ${moment(last.time)}` : "") : "";
  return [
    ["Command" + suffix, last.command && theirs(last.command, "mono small")],
    ["Not the default" + suffix, changed.childNodes.length ? changed : ""],
    ["Model" + suffix, of.model],
    ["Folder" + suffix, of.folder],
    ["Commit" + suffix, last.commit && theirs(last.commit, "mono small")],
    ["Machine" + suffix, last.machine],
    ["Started" + suffix, started],
  ];
}

function configTable(name, title, fields) {
  const body = el("tbody");
  for (const [field, value, usual] of fields) {
    body.append(el("tr", {}, theirs(field, "mono small", "td"), theirs(value, "mono small", "td"), theirs(usual === null ? "" : usual, "mono small soft", "td")));
  }
  const head = el("thead", {}, el("tr", {}, el("th", {}, "field"), el("th", {}, "value"), el("th", {}, "default, if another")));
  return folded(name, title, el("div", {class: "scroll"}, el("table", {}, head, body)));
}

function tiles(list) {
  const box = el("div", {class: "tiles"});
  for (const [value, label, from] of list) box.append(el("div", {class: "tile"}, el("b", {}, value), el("span", {}, label), el("span", {class: "from"}, from)));
  return box;
}

function notes() {
  const box = el("div", {class: "notes"});
  for (const note of D.notes) box.append(theirs(note, "", "p"));
  return D.notes.length ? box : null;
}

function footer() {
  const {count, of, rule} = D.kept;
  const all = count === of ? `All ${plural(of, "trajectory").replace("trajectorys", "trajectories")} of the table${D.kind === "training" ? "" : "s"} can be opened.`
    : `${count.toLocaleString("en-US")} of ${of.toLocaleString("en-US")} trajectories are in this file, as many as have room: ${rule}.`;
  return el("p", {class: "soft small", id: "kept"}, of ? all + " " : "", "Made " + new Date(1000 * D.made).toLocaleString() + ".");
}

// ------------------------------------------------------------------ charts

const W = 360, H = 176, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;
const cursors = []; // of all charts: functions of an index of D.steps, or of nothing

function niceTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw)), lead = raw / power;
  const step = power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10), ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}
function logTicks(low, high) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), ticks = [];
  const every = Math.max(1, Math.ceil((last - first) / 4));
  for (let i = first; i <= last; i += every) ticks.push(10 ** i);
  if (ticks.length > 2) return ticks;
  return [first - 1, first, last].flatMap((i) => [1, 2, 5].map((lead) => lead * 10 ** i)).filter((v, i, all) => v >= low && v <= high && all.indexOf(v) === i);
}

// A scale from values to pixels, with its ticks.
function scale(low, high, from, to, log) {
  if (!(high > low)) { const by = Math.abs(low) * 0.1; low -= log ? low / 2 : by; high += by || 0.01; }
  const f = log ? Math.log : (x) => x;
  const at = (x) => from + ((f(x) - f(low)) / (f(high) - f(low))) * (to - from);
  return {at, low, high, ticks: log ? logTicks(low, high) : niceTicks(low, high, 5)};
}

function frame(x, y, format, formatX = (v) => short(v)) {
  const root = svg("svg", {viewBox: `0 0 ${W} ${H}`, "aria-hidden": "true"});
  for (const tick of y.ticks) {
    const at = y.at(tick);
    root.append(svg("line", {class: "grid", x1: LEFT, x2: W - RIGHT, y1: at, y2: at}));
    root.append(svg("text", {x: LEFT - 6, y: at + 3.5, "text-anchor": "end"}, format(tick)));
  }
  for (const tick of x.ticks) root.append(svg("text", {x: x.at(tick), y: H - 5, "text-anchor": "middle"}, formatX(tick)));
  return root;
}

// Lines that are broken where a value is missing; a value without neighbours is a dot.
function path(xs, ys, x, y) {
  let d = "", before = false;
  for (let i = 0; i < xs.length; i++) {
    const here = isNumber(ys[i]) && ys[i] >= y.least;
    if (here) d += (before ? "L" : "M") + x.at(xs[i]).toFixed(1) + " " + y.at(ys[i]).toFixed(1) + (before || isNumber(ys[i + 1]) ? "" : "h.01");
    before = here;
  }
  return d;
}
// Values that come now and then, as evaluations do, are joined.
function joined(xs, ys) {
  const there = xs.map((_, i) => i).filter((i) => isNumber(ys[i]));
  return [there.map((i) => xs[i]), there.map((i) => ys[i])];
}
// The mean of each value and its neighbours, as many to the left as to the right: it does not lag behind.
const REACH = Math.max(1, Math.round(D.steps ? D.steps.length / 50 : 0));
function smooth(ys) {
  return ys.map((own, i) => {
    if (!isNumber(own)) return null;
    const reach = Math.min(REACH, i, ys.length - 1 - i), near = ys.slice(i - reach, i + reach + 1).filter(isNumber);
    return near.reduce((sum, v) => sum + v, 0) / near.length;
  });
}

// {title, series: [{name, label, values, sparse}], format, log, zero, area, exact, limit: [value, words]}
function chart(spec) {
  const xs = D.steps, format = spec.format || short;
  let stacked = spec.series.map((s) => s.values);
  if (spec.area) stacked = stacked.map((_, i) => xs.map((_, j) => stacked.slice(0, i + 1).reduce((sum, v) => sum + (v[j] || 0), 0)));
  let values = stacked.flat().filter(isNumber);
  if (!values.length) return null;
  const positive = values.filter((v) => v > 0);
  const log = Boolean(spec.log) && positive.length > 0 && Math.max(...positive) > 30 * Math.min(...positive);
  if (log) values = positive;
  if (spec.limit && isNumber(spec.limit[0]) && spec.limit[0] > 0) values = values.concat(spec.limit[0]);
  let low = Math.min(...values), high = Math.max(...values);
  if (!log && (spec.area || spec.zero || low > 0 && low < 0.35 * high)) low = Math.min(0, low);
  if (!log) { const room = 0.06 * (high - low); high += room; if (low !== 0) low -= room; }
  const y = scale(low, high, H - BOTTOM, TOP, log), x = scale(xs[0], xs[xs.length - 1], LEFT, W - RIGHT);
  y.least = log ? Number.MIN_VALUE : -Infinity;
  const tickFormat = log ? (v) => (v >= 0.01 && v < 1e4 ? short(v, 1) : v.toExponential(0).replace("e+", "e")) : format;
  const root = frame(x, y, tickFormat);

  // Marks of what did not go as planned, behind the lines.
  for (const [kind, step, words] of D.marks) {
    const at = x.at(step).toFixed(1), base = H - BOTTOM;
    if (kind !== "groups") root.append(svg("line", {class: "rule mark-" + kind, x1: at, x2: at, y1: TOP, y2: base}));
    root.append(svg("path", {class: "mark-" + kind, "stroke-width": 0, d: `M${at} ${base - 5}l3 5h-6z`}, svg("title", {}, `step ${step}: ` + visible(words))));
  }
  if (spec.limit && isNumber(spec.limit[0]) && spec.limit[0] > 0) {
    const at = y.at(spec.limit[0]);
    root.append(svg("line", {class: "limit", x1: LEFT, x2: W - RIGHT, y1: at, y2: at}));
  }

  // The lines, bold where they are smoothed; or areas on top of each other.
  for (let i = spec.series.length - 1; i >= 0; i--) {
    const own = spec.series[i], color = own.color === undefined ? i % 6 : own.color;
    if (spec.area) {
      const above = xs.map((v, j) => `${x.at(v).toFixed(1)} ${y.at(stacked[i][j]).toFixed(1)}`);
      root.append(svg("path", {class: "area full f" + color, d: `M${above.join("L")}L${x.at(xs[xs.length - 1])} ${y.at(0)}L${x.at(xs[0])} ${y.at(0)}Z`}));
    } else if (own.sparse) {
      const [sx, sy] = joined(xs, own.values);
      root.append(svg("path", {class: "line k" + color, d: path(sx, sy, x, y)}));
      if (sx.length <= 60) sx.forEach((v, j) => root.append(svg("circle", {class: "f" + color, cx: x.at(v), cy: y.at(sy[j]), r: 2.4})));
    } else {
      const many = xs.length > 60 && !spec.exact;
      root.append(svg("path", {class: "line k" + color + (many ? " raw" : ""), d: path(xs, own.values, x, y)}));
      if (many) root.append(svg("path", {class: "line k" + color, d: path(xs, smooth(own.values), x, y)}));
    }
  }

  // The values at the cursor, or the last ones, stand above.
  const keys = el("div", {class: "keys"}), outputs = [];
  spec.series.forEach((own, i) => {
    const value = el("b");
    outputs.push(value);
    keys.append(el("span", {}, el("span", {class: "swatch f" + (own.color === undefined ? i % 6 : own.color)}), visible(own.label) + " ", value));
  });
  if (spec.limit && isNumber(spec.limit[0]) && spec.limit[0] > 0) keys.append(el("span", {class: "warn"}, `┄ ${spec.limit[1]} `, el("b", {}, format(spec.limit[0]))));
  const line = svg("line", {class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden"});
  root.append(line);
  function show(index) {
    line.setAttribute("visibility", index === null ? "hidden" : "visible");
    if (index !== null) { line.setAttribute("x1", x.at(xs[index])); line.setAttribute("x2", x.at(xs[index])); }
    spec.series.forEach((own, i) => {
      let at = index === null ? xs.length - 1 : index;
      while ((index === null || own.sparse) && at > 0 && !isNumber(own.values[at])) at--;
      outputs[i].textContent = isNumber(own.values[at]) ? format(own.values[at]) : "–";
    });
  }
  show(null);
  cursors.push(show);
  function point(event) {
    const box = root.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * W;
    const step = x.low + ((at - LEFT) / (W - RIGHT - LEFT)) * (x.high - x.low);
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - step) < Math.abs(xs[best] - step)) best = i;
    moveCursor(best);
  }
  root.addEventListener("pointermove", point);
  root.addEventListener("pointerdown", point);
  root.addEventListener("pointerleave", () => moveCursor(null));
  return el("div", {class: "chart"}, el("h3", {}, visible(spec.title), spec.note ? el("span", {class: "soft small"}, " " + spec.note) : null, log ? el("span", {class: "soft small"}, spec.note ? ", log" : " log") : null), keys, root);
}

function moveCursor(index) {
  for (const show of cursors) show(index);
  const now = document.getElementById("now");
  if (!now) return;
  now.textContent = "";
  if (index === null) return;
  const step = D.steps[index], half = D.per / 2 + 0.01;
  const words = D.marks.filter((m) => Math.abs(m[1] - step) < half).map((m) => visible(m[2]));
  now.append(`step ${short(step, 8)}`, words.length ? ": " + words.slice(0, 3).join("; ") : "");
}

// Bars of right and wrong responses on top of each other.
function histogram(title, bars, format) {
  const {edges, right, wrong} = bars;
  if (!edges.length) return null;
  const most = Math.max(...right.map((n, i) => n + wrong[i]));
  const x = scale(edges[0], edges[edges.length - 1], LEFT, W - RIGHT), y = scale(0, most * 1.05, H - BOTTOM, TOP);
  y.ticks = y.ticks.filter((t) => Number.isInteger(t));
  const root = frame(x, y, (v) => short(v), format), total = right.reduce((a, b) => a + b, 0) + wrong.reduce((a, b) => a + b, 0);
  right.forEach((count, i) => {
    const from = x.at(edges[i]) + 0.5, wide = Math.max(0.5, x.at(edges[i + 1]) - x.at(edges[i]) - 1);
    const words = `${format(edges[i])} to ${format(edges[i + 1])}: ${count} right, ${wrong[i]} wrong, ${percent((count + wrong[i]) / total)} of all`;
    const parts = [[0, count, "f2"], [count, wrong[i], "f1"]];
    for (const [below, n, color] of parts) if (n) root.append(svg("rect", {class: "area " + color, x: from, width: wide, y: y.at(below + n), height: y.at(below) - y.at(below + n)}, svg("title", {}, words)));
  });
  const keys = el("div", {class: "keys"}, el("span", {}, el("span", {class: "swatch f2"}), "right"), el("span", {}, el("span", {class: "swatch f1"}), "wrong"));
  return el("div", {class: "chart"}, el("h3", {}, visible(title)), keys, root);
}

// ------------------------------------------------------------------ curves of a training run

function curves() {
  const columns = new Map(D.curves), used = new Set(), box = el("div", {class: "charts"});
  const any = (name) => columns.has(name) && columns.get(name).some(isNumber);
  const series = (...pairs) => pairs.filter(([name]) => any(name)).map(([name, label, color]) => {
    used.add(name);
    return {name, label, color, values: columns.get(name), sparse: name.startsWith("eval/")};
  });
  const add = (spec) => { const drawn = spec.series.length ? chart(spec) : null; if (drawn) box.append(drawn); };
  const rate = (count, seconds) => D.steps.map((_, i) => {
    const n = (columns.get(count) || [])[i], s = (columns.get(seconds) || [])[i];
    return isNumber(n) && isNumber(s) && s > 0 ? n / s : null;
  });

  add({title: "Reward", series: series(["reward", "all", 0], ["reward_kept", "useful groups", 4])});
  add({title: "Accuracy", series: series(["accuracy", "rollouts", 0], ["eval/accuracy", "evaluation", 1]), format: (v) => percent(v, 0)});
  add({title: "Tokens per forward", series: series(["tpf", "rollouts", 0], ["eval/tpf", "evaluation", 1])});
  add({title: "Loss", series: series(["loss", "loss", 0], ["certainty_nll", "certainty", 3])});
  add({title: "Response length", note: "tokens", series: series(["response_tokens", "rollouts", 0], ["eval/tokens", "evaluation", 1])});
  add({title: "Truncated", series: series(["truncation_rate", "rollouts", 0], ["eval/truncated", "evaluation", 1]), format: (v) => percent(v, 1), zero: true});
  add({title: "Groups", series: series(["groups_asked", "asked", 5], ["groups_kept", "useful", 0]), zero: true, limit: D.limits ? [D.limits.groups, "wanted"] : null});
  add({title: "Engine-trainer gap", note: "nats per token", series: series(["gap_capped", "capped", 0], ["gap_mean", "mean", 2], ["gap_max", "largest", 1], ["gap_holds", "holds", 3]), log: true, limit: D.limits ? [D.limits.gap, "gap_limit"] : null});
  add({title: "Entropy", note: "nats", series: series(["entropy", "entropy", 0])});
  add({title: "Clipped", note: "share of actions", series: series(["clip_fraction", "clip fraction", 0]), format: (v) => percent(v, 2), zero: true});
  add({title: "KL", note: "nats per action", series: series(["policy_kl", "to the sampling policy", 0], ["kl", "to the reference", 3])});
  add({title: "Gradient norm", series: series(["grad_norm", "before clipping", 0]), log: true, limit: D.limits ? [D.limits.max_grad_norm, "max_grad_norm"] : null});
  add({title: "Learning rate", series: series(["lr", "lr", 0]), log: true, zero: true, exact: true, format: (v) => (v ? v.toExponential(1).replace(".0", "") : "0")});
  const phases = [...columns.keys()].filter((name) => name.startsWith("seconds/"));
  add({title: "Seconds per step", series: series(...phases.map((name) => [name, name.slice(8)])), area: true});
  const speeds = [["rollout_tokens", "seconds/rollout", "rollout", 0], ["train_tokens", "seconds/train", "training", 1]].map(([n, s, label, color]) => ({name: label, label, color, values: rate(n, s)}));
  add({title: "Tokens per second", series: speeds.filter((s) => s.values.some(isNumber)), zero: true});

  // What else was logged, one chart each.
  const rest = el("div", {class: "charts"});
  for (const name of columns.keys()) {
    if (used.has(name) || !any(name)) continue;
    const drawn = chart({title: name, series: series([name, name.split("/").pop()])});
    if (drawn) rest.append(drawn);
  }
  return [box, rest.childNodes.length ? folded("rest", `${plural(rest.childNodes.length, "more metric")}`, rest) : null];
}

function marks() {
  const words = {skipped: "skipped steps", gap: "skipped for gap_limit", groups: "fewer groups than wanted", resume: "resumes"};
  const box = el("div", {class: "marks"});
  for (const [kind, label] of Object.entries(words)) {
    if (D.counts[kind]) box.append(el("span", {}, el("span", {class: "swatch mark-" + kind}), `${label}: ${D.counts[kind]}`));
  }
  if (D.per > 1) box.append(el("span", {}, `each point: the mean of ${D.per} steps`));
  if (D.steps.length > 60) box.append(el("span", {}, `bold: the mean of ${2 * REACH + 1} points`));
  box.append(el("span", {class: "now", id: "now"}));
  return box;
}

function lastOf(name) {
  const found = D.curves.find(([n]) => n === name);
  const values = found ? found[1].filter(isNumber) : [];
  return values.length ? [values[0], values[values.length - 1]] : null;
}

function training() {
  const script = {dipo: "DiPO", sft: "SFT"}[D.script] || "training";
  const status = D.running ? "running" : isNumber(D.wanted) && D.last >= D.wanted ? "finished" : "not running";
  const lead = el("p", {class: "lead"}, el("span", {class: "dot" + (D.running ? " on" : "")}), `${script} run, ${status}, step ${D.last.toLocaleString("en-US")}`, isNumber(D.wanted) ? ` of ${D.wanted.toLocaleString("en-US")}` : "", el("span", {id: "age"}));
  page.append(header(lead));

  const list = [];
  const tile = (name, label, format, digits) => {
    const ends = lastOf(name);
    if (ends) list.push([format(ends[1], digits), label, "from " + format(ends[0], digits)]);
  };
  tile("eval/accuracy", "accuracy, evaluation", percent);
  tile("accuracy", "accuracy of rollouts", percent);
  tile("eval/tpf", "TPF, evaluation", short);
  tile("tpf", "TPF of rollouts", short);
  tile("reward", "reward", short);
  tile("loss", "loss", short);
  let seconds = 0;
  for (const [name, values] of D.curves) if (name.startsWith("seconds/")) for (const v of values) seconds += (v || 0) * D.per;
  if (seconds) list.push([duration(seconds), "in steps", plural(D.last, "step")]);
  page.append(tiles(list.slice(0, 6)));
  page.append(about(origin(D)));
  if (D.fields.length) page.append(configTable("config", `all ${D.fields.length} fields of the config`, D.fields));
  const warnings = notes();
  if (warnings) page.append(warnings);

  page.append(el("h2", {}, "Curves"));
  if (D.steps.length) page.append(marks(), ...curves().filter(Boolean)); else page.append(el("p", {class: "soft"}, "No step is done yet."));
  if (D.rows.length) page.append(el("h2", {}, "Rollouts"), ...rolloutTable());
  page.append(footer());
  if (D.running) reloadNowAndThen();
}

// ------------------------------------------------------------------ tables

function verdict(flags, answer) {
  if (flags & 1) return el("span", {class: "verdict right"}, "✓ right");
  return el("span", {class: "verdict wrong"}, flags & 2 ? "✗ truncated" : answer === null ? "✗ no answer" : "✗ wrong");
}

// Buttons of which one is chosen, with the number of rows behind each.
function choices(name, options, changed) {
  const box = el("div", {class: "group", role: "group", "aria-label": name});
  const show = () => [...box.children].forEach((b) => b.setAttribute("aria-pressed", String(b.value === String(state[name]))));
  for (const [value, label] of options) {
    box.append(el("button", {type: "button", value, onclick: () => { state[name] = value; show(); changed(); }}, label));
  }
  show();
  return box;
}
function searchField(changed) {
  return el("input", {type: "search", id: "search", placeholder: "search", "aria-label": "search", value: state.search, oninput: (event) => { state.search = event.target.value; changed(); }});
}

// A list that is shown a hundred rows at a time.
function paged(rows, row, body, below) {
  let shown = 0;
  body.textContent = "";
  const more = () => {
    body.append(...rows.slice(shown, shown + 100).map(row));
    shown = Math.min(rows.length, shown + 100);
    below.textContent = "";
    if (!rows.length) below.append(el("p", {class: "soft"}, "Nothing of that kind."));
    else if (shown < rows.length) below.append(el("button", {type: "button", onclick: more}, `show ${Math.min(100, rows.length - shown)} more of ${(rows.length - shown).toLocaleString("en-US")}`));
  };
  more();
}

function rolloutTable() {
  const total = (row) => row.rewards.map(([, v]) => v);
  const filters = {all: () => true, right: (r) => r.flags & 1, wrong: (r) => !(r.flags & 1), truncated: (r) => r.flags & 2};
  if (!filters[state.filter]) state.filter = "all";
  const body = el("tbody"), below = el("div", {class: "more"});
  const sorters = {step: (r) => r.step, advantage: (r) => r.advantage, TPF: (r) => r.tpf, tokens: (r) => r.tokens};
  const [sorted, down] = state.sort.split(" ");
  const order = {name: sorters[sorted] ? sorted : "step", down: down !== "up"};
  let shown = [];
  const row = (r) => {
    const rewards = el("span", {}, ...r.rewards.map(([name, v], i) => el("span", {title: visible(name)}, (i ? ", " : "") + short(v))));
    const cell = (name, content, extra = "") => el("td", {"data-name": name, class: extra}, content);
    const open = el("button", {type: "button", class: "plain question", "data-key": r.key}, theirs(r.question));
    return el("tr", {class: "open", onclick: () => openViewer(r.key, shown.map((s) => s.key), r)},
      el("td", {class: "wide"}, open), cell("", verdict(r.flags, r.answer)), cell("answer", r.answer === null ? el("span", {class: "soft"}, "none") : theirs(r.answer, "answer")), cell("gold", theirs(r.gold, "answer")),
      cell("reward", rewards, "num"), cell("advantage", signed(r.advantage), "num"), cell("TPF", short(r.tpf), "num"), cell("tokens", short(r.tokens, 6), "num"), cell("step", short(r.step, 8), "num"));
  };
  function update() {
    const find = state.search.toLowerCase();
    shown = D.rows.filter((r) => filters[state.filter](r) && (!find || [r.question, r.gold, r.answer || ""].some((t) => t.toLowerCase().includes(find))));
    const value = sorters[order.name], sign = order.down ? -1 : 1;
    shown.sort((a, b) => sign * ((isNumber(value(a)) ? value(a) : -Infinity) - (isNumber(value(b)) ? value(b) : -Infinity)) || 0);
    paged(shown, row, body, below);
  }
  const headCell = (name) => {
    if (!sorters[name]) return el("th", {class: name === "reward" ? "num" : ""}, name);
    return el("th", {class: "num"}, el("button", {type: "button", class: "plain", title: "sort", onclick: () => {
      order.down = order.name === name ? !order.down : true; order.name = name;
      state.sort = name + (order.down ? " down" : " up");
      update();
    }}, name + " ↕"));
  };
  const head = el("thead", {}, el("tr", {}, ...["question", "verdict", "answer", "gold", "reward", "advantage", "TPF", "tokens", "step"].map(headCell)));
  const label = (name) => `${name} ${D.rows.filter(filters[name]).length.toLocaleString("en-US")}`;
  const bar = el("div", {class: "tools"}, choices("filter", Object.keys(filters).map((name) => [name, label(name)]), update), searchField(update));
  update();
  const first = D.rows[0], names = first ? first.rewards.map(([name]) => visible(name)).join(", ") : "";
  return [bar, el("div", {class: "scroll"}, el("table", {class: "cards", id: "rows"}, head, body)), below, names && total(first).length > 1 ? el("p", {class: "soft small"}, "Rewards: " + names + ".") : ""];
}

function chip(question, sample, number, keys) {
  const [answer, flags, tokens, tpf, key] = sample, words = answer < 0 ? null : question[2][answer];
  const title = `sample ${number + 1}: ${flags & 1 ? "right" : flags & 2 ? "truncated" : "wrong"}, ${tokens} tokens, TPF ${tpf}`;
  const facts = {question: D.texts[question[0]], gold: question[1], answer: words, flags, tokens, tpf};
  return el("button", {type: "button", class: "chip theirs " + (flags & 1 ? "right" : "wrong") + (flags & 2 ? " cut" : "") + (kept.has(key) ? "" : " gone"), title, "data-key": key, onclick: () => openViewer(key, keys(), facts)}, words === null ? "–" : visible(words));
}

function questionTable(file) {
  const samples = (q) => q[4], right = (q) => samples(q).filter((s) => s[1] & 1).length;
  const many = file.questions.some((q) => samples(q).length > 1);
  const filters = {all: () => true, right: (q) => right(q) === samples(q).length, wrong: (q) => right(q) < samples(q).length, truncated: (q) => samples(q).some((s) => s[1] & 2)};
  if (many) filters["majority wrong"] = (q) => q[3];
  if (!filters[state.filter]) state.filter = "all";
  const body = el("tbody"), below = el("div", {class: "more"});
  let shown = [];
  const keys = () => shown.flatMap((q) => samples(q).map((s) => s[4]));
  const mean = (q, i) => samples(q).reduce((sum, s) => sum + s[i], 0) / samples(q).length;
  const row = (q) => el("tr", {}, el("td", {class: "wide"}, theirs(D.texts[q[0]], "question", "div")), el("td", {"data-name": "gold"}, theirs(q[1], "answer")),
    el("td", {class: many ? "wide" : ""}, el("div", {class: "chips"}, ...samples(q).map((s, i) => chip(q, s, i, keys)))),
    el("td", {class: "num", "data-name": "right"}, many ? `${right(q)} of ${samples(q).length}` : el("span", {class: right(q) ? "right" : "wrong"}, right(q) ? "✓" : "✗")), el("td", {class: "num", "data-name": "TPF"}, short(mean(q, 3))), el("td", {class: "num", "data-name": "tokens"}, short(mean(q, 2))));
  function update() {
    const find = state.search.toLowerCase();
    const words = (q) => [D.texts[q[0]], q[1], ...q[2]].some((t) => t.toLowerCase().includes(find));
    shown = file.questions.filter((q) => filters[state.filter](q) && (!find || words(q)));
    paged(shown, row, body, below);
  }
  const head = el("thead", {}, el("tr", {}, ...["question", "gold", many ? "answers" : "answer"].map((n) => el("th", {}, n)), ...["right", "TPF", "tokens"].map((n) => el("th", {class: "num"}, n))));
  const label = (name) => `${name === "right" && many ? "all right" : name} ${file.questions.filter(filters[name]).length.toLocaleString("en-US")}`;
  const bar = el("div", {class: "tools"}, choices("filter", Object.keys(filters).map((name) => [name, label(name)]), update), searchField(update));
  update();
  return el("div", {}, bar, el("div", {class: "scroll"}, el("table", {class: "cards", id: "rows"}, head, body)), below);
}

// ------------------------------------------------------------------ an evaluation

// An interval from 0 to 1 with its middle.
function interval(middle, low, high) {
  const root = svg("svg", {viewBox: "0 0 130 14", class: "bar", "aria-hidden": "true"});
  root.append(svg("line", {class: "grid", x1: 1, x2: 129, y1: 7, y2: 7}));
  const at = (v) => 1 + 128 * Math.min(1, Math.max(0, v));
  if (isNumber(low) && isNumber(high)) root.append(svg("rect", {class: "area f0", x: at(low), width: Math.max(1, at(high) - at(low)), y: 4, height: 6, rx: 3}));
  if (isNumber(middle)) root.append(svg("circle", {class: "f0", cx: at(middle), cy: 7, r: 3.5}));
  return root;
}

function figuresTable() {
  const body = el("tbody"), several = new Set(D.figures.map((f) => f.benchmark)).size > 1;
  for (const f of D.figures) {
    const cells = [percent(f.accuracy), isNumber(f.accuracy_low) ? `${(100 * f.accuracy_low).toFixed(1)} – ${(100 * f.accuracy_high).toFixed(1)}` : "–"];
    body.append(el("tr", {}, theirs(several ? f.benchmark + ", " + f.rule : f.rule, "", "td"), el("td", {class: "num"}, short(f.questions, 8)), el("td", {class: "num"}, short(f.samples, 8)), ...cells.map((c) => el("td", {class: "num"}, c)), el("td", {}, interval(f.accuracy, f.accuracy_low, f.accuracy_high)),
      ...[percent(f.pass_at_k), percent(f.maj_at_k), isNumber(f.tpf) ? f.tpf.toFixed(2) : "–", isNumber(f.tokens) ? f.tokens.toFixed(1) : "–", percent(f.truncated), short(f.tokens_per_second, 6)].map((c) => el("td", {class: "num"}, c))));
  }
  const names = ["", "questions", "k", "accuracy", "95 %", "", "pass@k", "maj@k", "TPF", "tokens", "truncated", "tokens/s"];
  return el("div", {class: "scroll"}, el("table", {}, el("thead", {}, el("tr", {}, ...names.map((n, i) => el("th", {class: i && i !== 5 ? "num" : ""}, n)))), body));
}

// Accuracy against TPF and against the threshold, where dynamic-T was measured at several T.
function sweep() {
  const of = new Map();
  for (const f of D.figures) {
    const found = /^dynamic-([0-9.e+-]+)$/.exec(f.rule);
    if (found && isNumber(f.tpf) && isNumber(f.accuracy)) of.set(f.benchmark, [...(of.get(f.benchmark) || []), {...f, threshold: Number(found[1])}]);
  }
  const drawn = [], curve = (title, get, points, statics) => {
    const xs = points.map(get).concat(statics.map(get)).filter(isNumber), ys = points.concat(statics).flatMap((p) => [p.accuracy, p.accuracy_low, p.accuracy_high]).filter(isNumber);
    const wide = (Math.max(...xs) - Math.min(...xs)) * 0.06 || 0.1;
    const x = scale(Math.min(...xs) - wide, Math.max(...xs) + wide, LEFT, W - RIGHT), y = scale(Math.min(...ys) - 0.01, Math.max(...ys) + 0.01, H - BOTTOM, TOP);
    y.least = -Infinity;
    const root = frame(x, y, (v) => percent(v, 0));
    root.append(svg("path", {class: "line k0", d: path(points.map(get), points.map((p) => p.accuracy), x, y)}));
    const dot = (p, color, label) => {
      const at = x.at(get(p));
      if (isNumber(p.accuracy_low)) root.append(svg("line", {class: "line raw k" + color, x1: at, x2: at, y1: y.at(p.accuracy_low), y2: y.at(p.accuracy_high)}));
      root.append(svg("circle", {class: "f" + color, cx: at, cy: y.at(p.accuracy), r: 3.2}, svg("title", {}, `${label}: ${percent(p.accuracy)}, TPF ${short(p.tpf)}`)));
      root.append(svg("text", {class: "label", x: at + 5, y: y.at(p.accuracy) - 5}, label));
    };
    points.forEach((p) => dot(p, 0, String(p.threshold)));
    statics.forEach((p) => dot(p, 1, "static"));
    drawn.push(el("div", {class: "chart"}, el("h3", {}, visible(title)), root));
  };
  for (const [benchmark, points] of of) {
    points.sort((a, b) => a.threshold - b.threshold);
    const statics = D.figures.filter((f) => f.benchmark === benchmark && f.rule === "static" && isNumber(f.tpf) && isNumber(f.accuracy)), of_what = of.size > 1 ? benchmark + ": " : "";
    curve(of_what + "accuracy against tokens per forward, by threshold", (p) => p.tpf, points, statics);
    curve(of_what + "accuracy against threshold", (p) => p.threshold, points, []);
  }
  return drawn.length ? [el("h2", {}, "Sweep over thresholds"), el("div", {class: "charts"}, ...drawn)] : [];
}

function evaluation() {
  page.append(header(el("p", {class: "lead"}, "Evaluation: ", visible([...new Set(D.figures.map((f) => f.benchmark))].join(", ") + "; " + [...new Set(D.figures.map((f) => f.rule))].join(", ")))));
  page.append(about(origin(D)));
  if (D.fields.length) page.append(configTable("config", `all ${D.fields.length} fields of the config`, D.fields));
  const warnings = notes();
  if (warnings) page.append(warnings);
  page.append(el("h2", {}, "Figures"), figuresTable());
  page.append(el("p", {class: "soft small"}, "95 %: bootstrap over the questions. Tokens: what a user sees, per response. Truncated responses are wrong."), ...sweep());

  page.append(el("h2", {}, "Questions"));
  const box = el("div");
  function show() {
    const file = D.files[state.file] || D.files[0];
    box.textContent = "";
    box.append(el("div", {class: "charts"}, histogram("Response length, tokens", file.bars.tokens, (v) => short(v)) || "", histogram("Tokens per forward", file.bars.tpf, (v) => short(v)) || ""), el("div", {class: "more"}), questionTable(file));
  }
  if (!D.files.length) box.append(el("p", {class: "soft"}, "No responses are there."));
  else {
    const several = new Set(D.files.map((f) => f.benchmark)).size > 1;
    const label = (f) => visible(several ? f.benchmark + ", " + f.rule : f.rule);
    if (D.files.length > 1) page.append(el("div", {class: "tools"}, choices("file", D.files.map((f, i) => [i, label(f)]), show)));
    show();
  }
  page.append(box, footer());
}

// ------------------------------------------------------------------ two evaluations

// What two evaluations are: a row if it is the same for both, else one for each.
function differences(a, b) {
  const rows = [], left = new Map(a.fields.map(([name, value]) => [name, value])), changed = el("span", {class: "changed"});
  const last = (side) => side.starts[side.starts.length - 1] || {};
  const facts = (side) => [["Folder", side.folder], ["Model", side.model], ["Commit", last(side).commit], ["Machine", last(side).machine], ["Started", last(side).time && moment(last(side).time)]];
  facts(a).forEach(([name, ofA], i) => {
    const ofB = facts(b)[i][1];
    rows.push(...(ofA === ofB ? [[name, ofA]] : [[name + " A", ofA], [name + " B", ofB]]));
  });
  for (const [name, value] of b.fields) {
    if (left.has(name) && left.get(name) !== value && !["model", "out"].includes(name)) changed.append(el("span", {class: "mono small theirs"}, visible(`${name}: ${left.get(name)} in A, ${value} in B`)));
  }
  return rows.concat([["They differ in", changed.childNodes.length ? changed : ""]]);
}

function comparison() {
  const [a, b] = D.sides;
  page.append(header(el("p", {class: "lead"}, "Two evaluations, and the questions on which they differ")));
  page.append(about(differences(a, b)));
  const warnings = notes();
  if (warnings) page.append(warnings);

  const body = el("tbody");
  for (const p of D.parts) {
    const [mean, low, high, chance] = p.difference;
    body.append(el("tr", {}, theirs(p.benchmark + ", " + p.rule, "", "td"), el("td", {class: "num"}, short(p.count, 8)), ...[0, 1].flatMap((i) => [el("td", {class: "num"}, percent(p.accuracy[i])), el("td", {}, interval(p.accuracy[i], ...p.interval[i]))]),
      ...[signed(100 * mean, 1), `${signed(100 * low, 1)} to ${signed(100 * high, 1)}`, isNumber(chance) ? chance.toFixed(4) : "–", `${short(p.tpf[0])}, ${short(p.tpf[1])}`, short(p.differ, 8)].map((c) => el("td", {class: "num"}, c))));
  }
  const names = ["", "questions", "A", "", "B", "", "B − A", "95 %", "p", "TPF", "differ"];
  page.append(el("h2", {}, "Figures"), el("div", {class: "scroll"}, el("table", {}, el("thead", {}, el("tr", {}, ...names.map((n, i) => el("th", {class: n ? "num" : ""}, n)))), body)));
  page.append(el("p", {class: "soft small"}, "Points of accuracy; 95 % and p: paired bootstrap over the questions."));

  page.append(el("h2", {}, "Questions on which they differ"));
  const box = el("div");
  function show() {
    const part = D.parts[state.file] || D.parts[0];
    const share = (q) => q[4].filter((s) => s[1] & 1).length / q[4].length;
    const filters = {all: () => true, "A is better": ([x, y]) => share(x) > share(y), "B is better": ([x, y]) => share(x) < share(y)};
    if (!filters[state.filter]) state.filter = "all";
    const rows = el("tbody"), below = el("div", {class: "more"});
    let shown = [];
    const keys = () => shown.flatMap(([x, y]) => x[4].concat(y[4]).map((s) => s[4]));
    const side = (q, name) => el("td", {class: "wide", "data-name": name}, el("div", {class: "chips"}, ...q[4].map((s, i) => chip(q, s, i, keys))));
    const row = ([x, y]) => el("tr", {}, el("td", {class: "wide"}, theirs(D.texts[x[0]], "question", "div")), el("td", {"data-name": "gold"}, theirs(x[1], "answer")), side(x, "A"), side(y, "B"), el("td", {class: "num", "data-name": "B − A"}, signed(share(y) - share(x))));
    function update() {
      const find = state.search.toLowerCase();
      shown = part.rows.filter((pair) => filters[state.filter](pair) && (!find || [D.texts[pair[0][0]], pair[0][1], ...pair[0][2], ...pair[1][2]].some((t) => t.toLowerCase().includes(find))));
      paged(shown, row, rows, below);
    }
    const label = (name) => `${name} ${part.rows.filter(filters[name]).length.toLocaleString("en-US")}`;
    const bar = el("div", {class: "tools"}, choices("filter", Object.keys(filters).map((name) => [name, label(name)]), update), searchField(update));
    update();
    const head = el("thead", {}, el("tr", {}, ...["question", "gold", "A", "B"].map((n) => el("th", {}, n)), el("th", {class: "num"}, "B − A")));
    box.textContent = "";
    box.append(bar, el("div", {class: "scroll"}, el("table", {class: "cards", id: "rows"}, head, rows)), below);
  }
  if (D.parts.length > 1) page.append(el("div", {class: "tools"}, choices("file", D.parts.map((p, i) => [i, visible(p.benchmark + ", " + p.rule)]), show)));
  show();
  page.append(box, footer());
}

// ------------------------------------------------------------------ the trajectory viewer

async function unpacked(key) {
  const packed = Uint8Array.from(atob(document.getElementById("t-" + key).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

let playing = 0, setStep = null, neighbours = [], current = null;

function stopPlaying() {
  clearInterval(playing);
  playing = 0;
  const button = document.getElementById("play");
  if (button) button.textContent = "▶ play";
}
viewer.addEventListener("close", () => {
  stopPlaying();
  setStep = null;
  current = null;
  history.replaceState(null, "", location.pathname + location.search);
});
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });

function go(by) {
  const at = neighbours.indexOf(current) + by;
  if (at >= 0 && at < neighbours.length) openViewer(neighbours[at], neighbours);
}
viewer.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key, slider = document.getElementById("step");
  if (key === "j" || key === "k") { go(key === "j" ? 1 : -1); return; }
  if (!slider) return;
  const now = Number(slider.value), to = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: Number(slider.max)}[key];
  if (to !== undefined) { event.preventDefault(); stopPlaying(); setStep(to, true); }
  if (key === " " && event.target.tagName !== "BUTTON") { event.preventDefault(); document.getElementById("play").click(); }
});

async function openViewer(key, keys, facts, step) {
  stopPlaying();
  neighbours = keys && keys.length ? keys : [key];
  current = key;
  history.replaceState(null, "", "#" + key);
  const r = kept.has(key) ? await unpacked(key) : null;
  if (current !== key) return;
  viewer.textContent = "";
  viewer.append(viewerHead(r, facts || {}));
  if (!r) viewer.append(el("div", {class: "stream soft"}, `This trajectory is not in this file, which has room for ${D.kept.count} of ${D.kept.of}: ${D.kept.rule}. It is in the folder of the run.`));
  else if (!r.steps.length) viewer.append(theirs(r.text === undefined ? r.pieces.join("") : r.text, "stream", "div"));
  else viewer.append(...replay(r));
  if (!viewer.open) viewer.showModal();
  const slider = document.getElementById("step");
  if (slider) { slider.focus(); setStep(step === undefined ? Number(slider.max) : step); }
}

function viewerHead(r, facts) {
  const question = r ? r.question : facts.question || "", answer = r ? r.answer : facts.answer;
  const list = el("div", {class: "facts"});
  const add = (name, value) => { if (value !== null && value !== undefined && value !== "–") list.append(el("span", {}, name + " ", el("b", {class: "theirs"}, value))); };
  const found = r ? (r.correct ? 1 : 0) + (r.finish === "length" ? 2 : 0) : facts.flags || 0;
  list.append(verdict(found, answer === undefined ? null : answer));
  add("answer", answer === null || answer === undefined ? "none" : visible(answer));
  add("gold", visible(r ? r.gold : facts.gold || ""));
  add("TPF", short(r ? r.tpf : facts.tpf));
  add("tokens", short(r ? r.shown : facts.tokens, 6));
  if (r) {
    for (const [name, value] of r.rewards) add("reward " + visible(name), short(value));
    if (isNumber(r.advantage)) add("advantage", signed(r.advantage));
    if (isNumber(r.step)) add("training step", short(r.step, 8));
    add("seed", isNumber(r.seed) ? String(r.seed) : null);
    add("from", visible(r.where));
  }
  const buttons = [el("button", {type: "button", title: "previous (k)", onclick: () => go(-1)}, "↑"), el("button", {type: "button", title: "next (j)", onclick: () => go(1)}, "↓"), el("button", {type: "button", title: "close (Esc)", onclick: () => viewer.close()}, "✕")];
  return el("div", {class: "head"}, el("div", {class: "row"}, theirs(question, "asked", "div"), ...(neighbours.length > 1 ? buttons : buttons.slice(2))), list);
}

// What each position of a response went through: [{piece, step, block, turn, of, logprob, holds}], turn counted from 0.
function positions(r) {
  const found = [], stepsOf = new Map();
  let step = 0;
  r.steps.forEach((by, i) => {
    step += by;
    const block = Math.floor(((r.prompt || 0) + i) / r.block);
    if (!stepsOf.has(block)) stepsOf.set(block, new Set());
    stepsOf.get(block).add(step);
    found.push({piece: r.pieces ? r.pieces[i] : null, step, block, logprob: r.logprobs.length ? r.logprobs[i] : null});
  });
  const ordered = new Map([...stepsOf].map(([block, steps]) => [block, [...steps].sort((a, b) => a - b)]));
  let next = 0; // in the flat lists of holds
  for (const p of found) {
    const steps = ordered.get(p.block);
    p.turn = steps.indexOf(p.step);
    p.of = steps.length;
    p.earlier = steps.slice(0, p.turn);
    p.holds = p.earlier.map((s, i) => ({step: s, bound: r.bounds[next + i], held: r.held[next + i]}));
    next += p.earlier.length;
  }
  const sound = next === r.bounds.length;
  for (const p of found) if (!sound) p.holds = [];
  return found;
}

function chance(logprob) {
  if (!isNumber(logprob)) return "not recorded";
  const p = Math.exp(logprob);
  return p > 0.9999 && p < 1 ? "> 0.9999" : p >= 0.001 ? String(Number(p.toFixed(4))) : p.toExponential(1);
}
const SURE = [0.99, 0.9, 0.7, 0.5, 0.25, 0.1]; // probabilities that divide the colours p0 to p6

function replay(r) {
  const all = positions(r), stream = el("div", {class: "stream mono", id: "stream", tabindex: -1}), spans = [];
  const deepest = Math.max(...all.map((p) => p.turn));
  let block = null, box = null;
  all.forEach((p, i) => {
    if (p.block !== block) { box = el("span", {class: "b"}); stream.append(box); block = p.block; }
    const level = deepest < 8 ? p.turn : Math.round((7 * p.turn) / deepest);
    const sure = p.logprob === null ? 0 : SURE.filter((s) => Math.exp(p.logprob) < s).length;
    const span = el("span", {class: `t c${level} p${sure}` + (p.turn ? " held" : "") + (isNumber(r.shown) && i >= r.shown ? " after" : ""), "data-i": i});
    if (p.piece === null) span.append(el("i", {}, " ◦ "));
    else if (p.piece === "") span.append(el("i", {}, "◦"));
    else for (const part of p.piece.split(/(\n)/)) if (part) span.append(part === "\n" ? el("i", {}, "↵") : visible(part), part === "\n" ? "\n" : "");
    spans.push(span);
    box.append(span);
  });

  // Stepping changes the tokens of the steps in between only: they are sorted by step once.
  const order = all.map((_, i) => i).sort((a, b) => all[a].step - all[b].step || a - b);
  const steps = [...new Set(order.map((i) => all[i].step))], ends = steps.map((s, n) => n);
  const startOf = [];
  let at = 0;
  for (const s of steps) { startOf.push(at); while (at < order.length && all[order[at]].step === s) at++; }
  startOf.push(order.length);
  let shown = steps.length;
  const output = el("output", {for: "step"});
  const slider = el("input", {type: "range", id: "step", min: 0, max: ends.length, value: ends.length, "aria-label": "denoising step"});
  setStep = (to, follow) => {
    to = Math.min(steps.length, Math.max(0, to));
    if (shown > 0) for (let j = startOf[shown - 1]; j < startOf[shown]; j++) spans[order[j]].classList.remove("now");
    for (let j = startOf[Math.min(shown, to)]; j < startOf[Math.max(shown, to)]; j++) spans[order[j]].classList.toggle("m", to < shown);
    shown = to;
    slider.value = to;
    const revealed = to ? order.slice(startOf[to - 1], startOf[to]) : [];
    for (const i of revealed) spans[i].classList.add("now");
    const p = revealed.length ? all[revealed[0]] : null;
    output.textContent = p ? `step ${to} of ${steps.length}: block ${p.block - all[0].block + 1}, its step ${p.turn + 1} of ${p.of}, ${plural(revealed.length, "token")}` : `step 0 of ${steps.length}: all is masked`;
    if (follow && revealed.length) spans[revealed[0]].scrollIntoView({block: "nearest"});
    state.step = to;
  };
  slider.addEventListener("input", () => { stopPlaying(); setStep(Number(slider.value), true); });
  const play = el("button", {type: "button", id: "play", onclick: () => {
    if (playing) { stopPlaying(); return; }
    if (shown === steps.length) setStep(0);
    play.textContent = "❚❚ pause";
    playing = setInterval(() => { setStep(shown + 1, true); if (shown === steps.length) stopPlaying(); }, Math.max(40, Math.min(300, 12000 / steps.length)));
  }}, "▶ play");
  const controls = el("div", {class: "play"}, play, el("button", {type: "button", title: "a step back (←)", onclick: () => { stopPlaying(); setStep(shown - 1, true); }}, "‹"), el("button", {type: "button", title: "a step on (→)", onclick: () => { stopPlaying(); setStep(shown + 1, true); }}, "›"), slider, output);
  if (r.logprobs.length) {
    const by = el("select", {"aria-label": "colours", id: "colours"}, el("option", {value: "step"}, "colour: step in block"), el("option", {value: "sure"}, "colour: probability"));
    by.value = state.colours === "sure" ? "sure" : "step";
    const change = () => { state.colours = by.value; stream.classList.toggle("sure", by.value === "sure"); describe(null); };
    by.addEventListener("change", change);
    controls.append(by);
    stream.classList.toggle("sure", by.value === "sure");
  }

  // What is known of the token under the pointer; a tap or click keeps it there.
  const inspect = el("div", {class: "inspect", id: "inspect"});
  let pinned = null;
  function describe(i) {
    inspect.textContent = "";
    if (i === null) { inspect.append(legend(r, all, deepest, stream.classList.contains("sure"))); return; }
    const p = all[i], fact = (name, value) => el("span", {}, name + " ", el("b", {class: "theirs"}, value));
    const line = el("div", {class: "facts"}, p.piece === null ? null : fact("token", visible(JSON.stringify(p.piece))), fact("position", `${i + 1} of ${all.length}`), fact("revealed at step", `${steps.indexOf(p.step) + 1}, ${p.turn + 1} of ${p.of} in block ${p.block - all[0].block + 1}`), fact("probability at the reveal", chance(p.logprob)));
    inspect.append(line);
    if (isNumber(r.shown) && i >= r.shown) inspect.append(el("div", {}, "After the stop token: part of the trajectory, not of the text that a user sees."));
    if (!p.earlier.length) inspect.append(el("div", {}, "Revealed at the first step of its block, never held."));
    else if (!p.holds.length || !isNumber(p.holds[0].held)) inspect.append(el("div", {}, `Held at ${plural(p.earlier.length, "earlier step")} of its block; how surely is recorded with likelihood=exact.`));
    else inspect.append(...p.holds.map((h) => el("div", {}, `Held at step ${steps.indexOf(h.step) + 1}: `, isNumber(h.bound) ? fact("a draw was held if its p was below", chance(h.bound)) : "any draw was held", ", ", fact("which had the probability", chance(h.held)))));
  }
  const index = (event) => { const t = event.target.closest("[data-i]"); return t && stream.contains(t) ? Number(t.dataset.i) : null; };
  stream.addEventListener("pointerover", (event) => { const i = index(event); if (i !== null && pinned === null) describe(i); });
  stream.addEventListener("pointerleave", () => { if (pinned === null) describe(null); });
  stream.addEventListener("click", (event) => {
    const i = index(event);
    if (pinned !== null) spans[pinned].classList.remove("pin");
    pinned = i === pinned ? null : i;
    if (pinned !== null) spans[pinned].classList.add("pin");
    describe(pinned);
  });
  describe(null);
  const parts = [controls, stream, inspect];
  if (!r.pieces) stream.prepend(theirs(r.text, "", "p"), el("p", {class: "soft small"}, "Its tokens without their texts, which this record or this machine does not have:"));
  return parts;
}

function legend(r, all, deepest, sure) {
  const box = el("div", {class: "legend"}), item = (name, words) => box.append(el("span", {class: "t " + name}, words));
  if (sure) {
    box.className += " sure";
    const bounds = [1, ...SURE, 0];
    for (let i = 0; i <= SURE.length; i++) item("p" + i, i ? `${bounds[i + 1]} to ${bounds[i]}` : `p ≥ ${SURE[0]}`);
  } else {
    box.append("step within the block:");
    for (let i = 0; i <= Math.min(deepest, 7); i++) item("c" + i, String(deepest < 8 ? i + 1 : Math.round((i * deepest) / 7) + 1));
  }
  item("m", "");
  box.append("mask");
  if (all.some((p) => p.turn)) item("held", "held before");
  if (isNumber(r.shown) && r.shown < all.length) item("after", "after the stop token");
  box.append(el("span", {}, `${plural(all.length, "token")} in blocks of ${r.block}; point at one. Keys: ← → steps, space plays, j k next and previous.`));
  return box;
}

// ------------------------------------------------------------------ while a run goes

// The older the news, the rarer a look for newer ones. Never while a trajectory is open or the tab is hidden.
function reloadNowAndThen() {
  const age = document.getElementById("age");
  let due = Date.now() + 1000 * Math.min(300, Math.max(15, (Date.now() / 1000 - D.made) / 5));
  setInterval(() => {
    const old = Date.now() / 1000 - D.made;
    age.textContent = old < 5 ? ", news just now" : `, news ${duration(old)} ago` + (old > 1800 ? ": it may have ended" : "");
    if (Date.now() < due || document.hidden || viewer.open || String(getSelection())) return;
    due = Infinity;
    remember();
    location.reload();
  }, 1000);
}

({training, evaluation, comparison})[D.kind]();
// The trajectory that the address names, once the rest of this file is there.
addEventListener("load", () => {
  const key = location.hash.slice(1), step = state.step;
  if (kept.has(key)) openViewer(key, D.kind === "training" ? D.rows.map((r) => r.key) : [key], {}, step);
});
