"use strict";
// Draws the trace in the script element above. Every text reaches the page through textContent: a token is data.
const root = document.documentElement;
addEventListener("error", (event) => {
  root.dataset.error = event.message;
});

const SVG = "http://www.w3.org/2000/svg";
const ROOT = -1,
  LANE = 27,
  BOX = 20,
  TOP = 24,
  GAP = 16,
  LEFT = 14;
const LONG_RUN = 4,
  MANY_LEAVES = 30,
  LEAST_RUN_WIDTH = 140,
  MOST_TOKEN_WIDTH = 150,
  MOST_ANSWER = 150;
const run = JSON.parse(document.getElementById("trace").textContent);
const { nodes, steps, answers, summary } = run;
const promptLength = run.prompt.token_ids.length;
const byId = (id) => document.getElementById(id);

// ---------------------------------------------------------------------------------------------- small helpers

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  return fill(element, attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const number = (value, digits = 2) =>
  value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
const figure = (value) => number(value, Math.abs(value ?? 0) < 10 ? 3 : 2);
const count = (value, one, many = `${one}s`) => `${value} ${value === 1 ? one : many}`;

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95
    ? "100 %"
    : share >= 10
      ? `${share.toFixed(0)} %`
      : share >= 0.1
        ? `${share.toFixed(1)} %`
        : "< 0.1 %";
}

// Whitespace, control and direction characters, made visible.
function visible(text) {
  return Array.from(text, (c) => {
    const code = c.codePointAt(0);
    if (c === " ") return "␣";
    if (c === "\n") return "⏎";
    if (c === "\t") return "⇥";
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    return /[\p{Cc}\p{Cf}\p{Zs}\p{Zl}\p{Zp}]/u.test(c) && code !== 0x200d
      ? `\\u${code.toString(16).padStart(4, "0")}`
      : c;
  }).join("");
}

const readable = (text) => Array.from(text, (c) => (c === " " ? c : visible(c))).join("");
const tokenText = (node) => (node.text === "" ? `#${node.token_id}` : visible(node.text));

const pen = document.createElement("canvas").getContext("2d");
function width(text, size = 12) {
  pen.font = `${size}px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace`;
  return pen.measureText(text).width;
}

function shorten(text, room) {
  if (width(text) <= room) return text;
  const letters = Array.from(text);
  let low = 0,
    high = letters.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (width(`${letters.slice(0, middle).join("")}…`) <= room) low = middle;
    else high = middle - 1;
  }
  return `${letters.slice(0, low).join("")}…`;
}

// ------------------------------------------------------------------------------------------- what the tree is

const children = new Map([[ROOT, []], ...nodes.map((node) => [node.id, []])]);
for (const node of nodes) children.get(node.parent).push(node.id);

// Bottom-up facts: the best answer below, whether anything below was kept, and the step by which all of it had died.
const best = new Map(),
  kept = new Map(),
  gone = new Map(),
  deepest = new Map(),
  leaves = new Map();
for (const node of [...nodes].reverse()) {
  const below = children.get(node.id);
  const least = (facts, own) => below.reduce((value, child) => Math.min(value, facts.get(child)), own);
  const most = (facts, own) => below.reduce((value, child) => Math.max(value, facts.get(child)), own);
  best.set(node.id, least(best, node.answer ?? Infinity));
  kept.set(node.id, node.status === "ended" || below.some((child) => kept.get(child)));
  gone.set(node.id, most(gone, node.status === "pruned" ? node.died : below.length ? 0 : Infinity));
  deepest.set(node.id, most(deepest, node.depth));
  leaves.set(
    node.id,
    below.reduce((sum, child) => sum + leaves.get(child), below.length ? 0 : 1),
  );
}
if (![...kept.values()].some(Boolean)) for (const node of nodes) kept.set(node.id, true);
for (const below of children.values()) {
  below.sort(
    (a, b) => best.get(a) - best.get(b) || kept.get(b) - kept.get(a) || deepest.get(b) - deepest.get(a) || a - b,
  );
}

// Where each node comes when the tree is read lane by lane: rows in this order have what they share side by side.
const order = new Map();
for (const stack = [...children.get(ROOT)].reverse(); stack.length;) {
  const id = stack.pop();
  order.set(id, order.size);
  stack.push(...[...children.get(id)].reverse());
}

function pathTo(id) {
  const path = [];
  for (let at = id; at !== ROOT && at !== undefined; at = nodes[at].parent) path.push(at);
  return path.reverse();
}

function hasAncestor(id, ancestor) {
  for (let at = id; at >= ancestor; at = nodes[at].parent) if (at === ancestor) return true;
  return false;
}

const leafCount = children.get(ROOT).reduce((sum, child) => sum + leaves.get(child), 0);
const state = {
  step: steps.length,
  node: null,
  hover: null,
  block: null,
  playing: null,
  fold: leafCount > MANY_LEAVES && [...kept.values()].some((value) => !value),
  opened: new Set(),
  expandAll: false,
  expanded: new Set(),
};
let view = null;

// ------------------------------------------------------------------------------------------- where it is drawn

const isShown = (id) => !state.fold || kept.get(id) || state.opened.has(nodes[id].parent) || openedAbove(id);
function openedAbove(id) {
  for (let at = nodes[id].parent; at !== ROOT && !kept.get(at); at = nodes[at].parent) {
    if (state.opened.has(nodes[at].parent)) return true;
  }
  return false;
}
const shownChildren = (id) => children.get(id).filter(isShown);
const hiddenLeaves = (id) => children.get(id).reduce((sum, child) => sum + (isShown(child) ? 0 : leaves.get(child)), 0);

// Chains of single children, each with the chains that branch off its nodes; the best child goes on in its chain.
function chainFrom(first) {
  const chain = { nodes: [], branches: [] };
  for (let id = first; id !== undefined;) {
    chain.nodes.push(id);
    const [next, ...others] = shownChildren(id);
    chain.branches.push(...others.map((other) => chainFrom(other)));
    id = next;
  }
  return chain;
}

// Lanes: a chain keeps one lane; its branches hang below, those that leave last nearest, so that no edge crosses a box.
function layChain(chain, depthCount) {
  const from = nodes[chain.nodes[0]].depth,
    to = nodes[chain.nodes.at(-1)].depth;
  const top = new Int32Array(depthCount + 2).fill(1 << 29),
    bottom = new Int32Array(depthCount + 2).fill(-1);
  top.fill(0, from, to + 1);
  bottom.fill(0, from, to + 1);
  const placed = [[chain, 0]];
  const inOrder = [...chain.branches].sort((a, b) => nodes[b.nodes[0]].depth - nodes[a.nodes[0]].depth);
  for (const branch of inOrder) {
    const inner = layChain(branch, depthCount);
    let lane = 1;
    for (let d = 0; d < top.length; d++) if (inner.bottom[d] >= 0) lane = Math.max(lane, bottom[d] - inner.top[d] + 1);
    for (let d = 0; d < top.length; d++) {
      if (inner.bottom[d] < 0) continue;
      top[d] = Math.min(top[d], inner.top[d] + lane);
      bottom[d] = Math.max(bottom[d], inner.bottom[d] + lane);
    }
    placed.push(...inner.placed.map(([sub, at]) => [sub, at + lane]));
  }
  return { placed, top, bottom };
}

// Branches that leave the prompt itself: one chain each, packed below one another.
function layForest(depthCount) {
  const bottom = new Int32Array(depthCount + 2).fill(-1);
  const placed = [];
  for (const first of shownChildren(ROOT)) {
    const inner = layChain(chainFrom(first), depthCount);
    let lane = 0;
    for (let d = 0; d < bottom.length; d++)
      if (inner.bottom[d] >= 0) lane = Math.max(lane, bottom[d] - inner.top[d] + 1);
    for (let d = 0; d < bottom.length; d++) if (inner.bottom[d] >= 0) bottom[d] = inner.bottom[d] + lane;
    placed.push(...inner.placed.map(([chain, at]) => [chain, at + lane]));
  }
  return placed;
}

function badgeOf(node) {
  if (node.answer !== null)
    return {
      rank: `#${node.answer + 1}`,
      score: figure(answers[node.answer].score ?? answers[node.answer].cumulative_logprob),
    };
  if (node.status === "ended") return { rank: "■", score: node.reason, other: true };
  return null;
}

function boxWidth(id) {
  const node = nodes[id];
  const text = Math.min(Math.max(width(tokenText(node)), 8) + 13, MOST_TOKEN_WIDTH);
  return text + afterWidth(id);
}

function afterWidth(id) {
  const badge = badgeOf(nodes[id]),
    hidden = hiddenLeaves(id);
  let after = nodes[id].status === "pruned" ? 14 : 0;
  if (badge) after += width(badge.rank, 10.5) + 14 + width(badge.score, 11) + 9;
  if (hidden) after += width(`✕${hidden}`, 11) + 13;
  return after;
}

// Columns: one for each place in the answer. Where no shown branch begins or ends, a stretch of them can be one run.
function spansOf(ids, depthCount) {
  const cuts = new Set([1, depthCount + 1]);
  for (const id of ids) if (shownChildren(id).length !== 1) cuts.add(nodes[id].depth + 1);
  const begins = [...cuts].filter((d) => d <= depthCount + 1).sort((a, b) => a - b);
  return begins.slice(0, -1).map((from, i) => ({ from, to: begins[i + 1] - 1 }));
}

function measure(ids, depthCount) {
  const columns = new Float64Array(depthCount + 2);
  for (const id of ids) columns[nodes[id].depth] = Math.max(columns[nodes[id].depth], boxWidth(id));
  const spans = spansOf(ids, depthCount);
  const full = (span) => {
    let sum = -GAP;
    for (let d = span.from; d <= span.to; d++) sum += columns[d] + GAP;
    return sum;
  };
  const total = spans.reduce((sum, span) => sum + full(span) + GAP, 0);
  const room = byId("scroll").clientWidth - 2 * LEFT;
  for (const span of spans) {
    span.full = full(span);
    span.long = span.to - span.from + 1 >= LONG_RUN && total > room && span.full > LEAST_RUN_WIDTH;
    span.folded = span.long && !state.expandAll && !state.expanded.has(span.from);
    span.width = span.folded ? LEAST_RUN_WIDTH : span.full;
  }
  widen(
    spans.filter((span) => span.folded),
    room - spans.reduce((sum, span) => sum + span.width + GAP, -GAP),
  );
  let x = LEFT;
  for (const span of spans) {
    span.x = x;
    span.at = new Map();
    if (span.folded) {
      x += span.width + GAP;
      continue;
    }
    for (let d = span.from; d <= span.to; d++) {
      span.at.set(d, [x, columns[d]]);
      x += columns[d] + GAP;
    }
  }
  return { spans, width: x + LEFT };
}

// Runs share the room that is left, the shortest first; none gets more than it needs.
function widen(runs, room) {
  const hungry = [...runs].sort((a, b) => a.full - b.full);
  hungry.forEach((span, i) => {
    const more = Math.max(0, Math.min(span.full - span.width, room / (hungry.length - i)));
    span.width += more;
    room -= more;
  });
}

function layOut() {
  const ids = nodes.map((node) => node.id).filter(isShown);
  const depthCount = ids.reduce((most, id) => Math.max(most, nodes[id].depth), 0);
  const placed = layForest(depthCount);
  const { spans, width: wide } = measure(ids, depthCount);
  const spanOf = [];
  for (const span of spans) for (let d = span.from; d <= span.to; d++) spanOf[d] = span;
  const boxes = [],
    boxOf = new Map();
  for (const [chain, lane] of placed) {
    let last = null;
    for (const id of chain.nodes) {
      const span = spanOf[nodes[id].depth];
      if (last && span.folded && last.span === span) {
        last.ids.push(id);
        boxOf.set(id, last);
        continue;
      }
      const [x, w] = span.folded ? [span.x, span.width] : [span.at.get(nodes[id].depth)[0], boxWidth(id)];
      last = { ids: [id], span, x, width: w, lane, y: TOP + 8 + lane * LANE };
      boxes.push(last);
      boxOf.set(id, last);
    }
  }
  const lanes = boxes.reduce((most, box) => Math.max(most, box.lane + 1), 0);
  return { boxes, boxOf, spans, width: wide, height: TOP + 8 + lanes * LANE + 8 };
}

// ------------------------------------------------------------------------------------------------ drawing it

function drawTree() {
  view = layOut();
  const svg = byId("tree");
  svg.replaceChildren(...view.spans.flatMap(drawAxis), ...view.boxes.map(drawEdge), ...view.boxes.map(drawBox));
  svg.setAttribute("width", Math.max(view.width, 40));
  svg.setAttribute("height", view.height);
  for (const [id, pressed] of [
    ["fold", state.fold],
    ["expand", state.expandAll],
  ])
    byId(id).setAttribute("aria-pressed", pressed);
  byId("fold").hidden = ![...kept.values()].some((value) => !value);
  byId("expand").hidden = !view.spans.some((span) => span.long);
}

function drawAxis(span) {
  const label = span.folded ? `${span.from}–${span.to}` : null;
  if (label) return [draw("text", { class: "axis", x: span.x, y: 15 }, label)];
  return [...span.at].map(([d, [x]]) => draw("text", { class: "axis", x: x + 1, y: 15 }, String(d)));
}

function drawEdge(box) {
  const first = nodes[box.ids[0]],
    from = view.boxOf.get(first.parent);
  const y = box.y + BOX / 2;
  let path = null;
  if (from === undefined) path = rootEdge(box, y);
  else if (from.lane === box.lane) path = `M${from.x + from.width} ${y}H${box.x}`;
  else {
    // It leaves the edge to the parent's first child, which lies on the parent's own lane.
    const x = box.x - GAP / 2,
      start = from.y + BOX / 2;
    path = `M${x} ${start}V${y - 5}Q${x} ${y} ${x + 4} ${y}H${box.x}`;
  }
  box.edge = draw("path", { class: "edge", d: path });
  return box.edge;
}

// All first tokens leave one point: the end of the prompt.
function rootEdge(box, y) {
  const x = box.x - 8,
    start = view.boxes[0].y + BOX / 2;
  return y === start ? `M${x - 4} ${y}H${box.x}` : `M${x} ${start}V${y - 5}Q${x} ${y} ${x + 4} ${y}H${box.x}`;
}

function boxLabel(box) {
  return box.ids.length === 1
    ? tokenText(nodes[box.ids[0]])
    : readable(box.ids.map((id) => nodes[id].text || `#${nodes[id].token_id}`).join("")).trim() || "␣";
}

function opacityOf(ids) {
  const known = ids.map((id) => nodes[id].logprob).filter((value) => value !== null);
  if (!known.length) return 0.16;
  return 0.1 + 0.5 * Math.exp(known.reduce((sum, value) => sum + value, 0) / known.length);
}

function drawBox(box) {
  const lastId = box.ids.at(-1),
    last = nodes[lastId],
    after = afterWidth(lastId);
  const hidden = box.ids.reduce((sum, id) => sum + hiddenLeaves(id), 0);
  const inside = box.ids.length > 1 ? box.width - afterOf(box, hidden) : box.width - after;
  const label = boxLabel(box);
  const text = draw("text", { x: box.x + 6.5, y: box.y + 14.2 }, ...spaced(shorten(label, inside - 12)));
  const group = draw(
    "g",
    { class: "node", role: "button", tabindex: "-1", "aria-label": describe(box), "data-id": lastId },
    draw("rect", {
      class: "box",
      x: box.x,
      y: box.y,
      width: Math.max(inside, 12),
      height: BOX,
      rx: 5,
      "fill-opacity": opacityOf(box.ids).toFixed(3),
    }),
    text,
  );
  let x = box.x + Math.max(inside, 12) + 4;
  if (last.status === "pruned") {
    group.append(draw("text", { class: "cross", x, y: box.y + 14 }, "✕"));
    x += 14;
  }
  const badge = badgeOf(last);
  if (badge) x = drawBadge(group, badge, x, box.y);
  if (hidden) group.append(drawMore(box, hidden, x));
  box.group = group;
  listen(box);
  return group;
}

// A run shows one mark for all the dead branches that leave it.
function afterOf(box, hidden) {
  const own = afterWidth(box.ids.at(-1)),
    ownHidden = hiddenLeaves(box.ids.at(-1));
  const mark = (value) => (value ? width(`✕${value}`, 11) + 13 : 0);
  return own - mark(ownHidden) + mark(hidden);
}

function spaced(text) {
  return text
    .split(/([␣⏎⇥])/u)
    .filter(Boolean)
    .map((part) => (/^[␣⏎⇥]$/u.test(part) ? draw("tspan", { class: "blank" }, part) : draw("tspan", {}, part)));
}

function drawBadge(group, badge, x, y) {
  const wide = width(badge.rank, 10.5) + 10;
  group.append(
    draw("rect", { class: badge.other ? "badge other" : "badge", x, y: y + 2.5, width: wide, height: 15, rx: 7.5 }),
    draw("text", { x: x + 5, y: y + 13.6 }, badge.rank),
    draw("text", { class: "score", x: x + wide + 4, y: y + 14 }, badge.score),
  );
  return x + wide + 4 + width(badge.score, 11) + 9;
}

function drawMore(box, hidden, x) {
  const label = `✕${hidden}`,
    wide = width(label, 11) + 8;
  const more = draw(
    "g",
    { class: "more" },
    draw("title", {}, `${count(hidden, "dead branch", "dead branches")} folded here: click to show`),
    draw("rect", { x, y: box.y + 2, width: wide, height: 16, rx: 4 }),
    draw("text", { x: x + 4, y: box.y + 14 }, label),
  );
  more.addEventListener("click", (event) => {
    event.stopPropagation();
    for (const id of box.ids) if (hiddenLeaves(id)) state.opened.add(id);
    redraw();
  });
  return more;
}

function describe(box) {
  const last = nodes[box.ids.at(-1)];
  const fate =
    last.status === "pruned"
      ? `died in step ${last.died}`
      : last.answer !== null
        ? `answer ${last.answer + 1}`
        : last.status;
  return `${boxLabel(box)}, place ${nodes[box.ids[0]].depth}${box.ids.length > 1 ? ` to ${last.depth}` : ""}, ${fate}`;
}

function listen(box) {
  const { group } = box,
    id = box.ids.at(-1);
  group.addEventListener("pointerenter", () => {
    state.hover = id;
    refresh();
  });
  group.addEventListener("pointerleave", () => {
    state.hover = null;
    refresh();
  });
  group.addEventListener("click", () => {
    if (box.span.folded) state.expanded.add(box.span.from);
    choose(id);
    if (box.span.folded) redraw();
  });
  group.addEventListener("dblclick", () => {
    state.expanded.delete(box.span.from);
    redraw();
  });
}

// ------------------------------------------------------------------------------- what changes with step and token

function refresh() {
  const focus = state.hover ?? state.node;
  const on = new Set(focus === null ? [] : pathTo(focus));
  const held = state.block === null ? new Set() : tokensIn(state.block);
  byId("tree").classList.toggle("lit", on.size > 0);
  for (const box of view.boxes) {
    const first = nodes[box.ids[0]],
      last = nodes[box.ids.at(-1)];
    const future = first.step > state.step,
      dead = gone.get(last.id) <= state.step;
    const lit = box.ids.some((id) => on.has(id));
    const now = box.ids.length === 1 && first.step === state.step && state.step < steps.length;
    const classes = { future, dead, now, on: lit, held: box.ids.some((id) => held.has(id)) };
    for (const [name, value] of Object.entries(classes)) box.group.classList.toggle(name, value);
    for (const name of ["future", "dead", "on"]) box.edge.classList.toggle(name, classes[name]);
  }
  showStep();
  showBlocks(focus);
  showToken(focus);
  showAnswers(focus);
}

function redraw() {
  drawTree();
  refresh();
}

function choose(id) {
  state.node = id;
  if (id !== null && nodes[id].step > state.step) state.step = nodes[id].step;
  refresh();
  remember();
  reveal(id);
}

function reveal(id) {
  const box = id === null ? undefined : view.boxOf.get(id),
    scroll = byId("scroll");
  if (!box) return;
  if (box.x < scroll.scrollLeft || box.x + box.width > scroll.scrollLeft + scroll.clientWidth)
    scroll.scrollLeft = box.x - scroll.clientWidth / 3;
  if (box.y < scroll.scrollTop || box.y + LANE > scroll.scrollTop + scroll.clientHeight)
    scroll.scrollTop = box.y - scroll.clientHeight / 3;
}

function goTo(step, keepUp = true) {
  state.step = Math.max(0, Math.min(steps.length, step));
  refresh();
  remember();
  const newest = keepUp && view.boxes.find((box) => box.ids.some((id) => nodes[id].step === state.step));
  if (newest && !newest.span.folded) reveal(newest.ids.at(-1));
}

function showStep() {
  byId("step").value = state.step;
  byId("step").style.setProperty("--at", `${(100 * state.step) / Math.max(1, steps.length)}%`);
  byId("step-value").textContent = `step ${state.step} of ${steps.length}`;
  const cursor = byId("chart").querySelector(".cursor");
  if (cursor) {
    const x = chartX(state.step);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
  const now = steps[state.step - 1];
  byId("chart-legend").lastChild.textContent = now
    ? `step ${now.step}: ${count(now.blocks_held, "block")} in use, ${now.blocks_separate} if separate · ${count(now.forks.length, "fork")} · ${count(now.pruned.length, "branch", "branches")} pruned`
    : "before the first step";
}

let chartX = () => 0;
function drawChart() {
  const svg = byId("chart"),
    wide = svg.clientWidth || 600,
    high = 46;
  svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
  const most = Math.max(1, ...steps.map((step) => Math.max(step.blocks_separate, step.blocks_held)));
  const x = (step) => 8 + (wide - 16) * (steps.length ? step / steps.length : 0),
    y = (value) => high - 3 - ((high - 8) * value) / most;
  chartX = x;
  const stairs = (key) =>
    steps.map((step) => `L${x(step.step - 1)} ${y(step[key])}L${x(step.step)} ${y(step[key])}`).join("");
  const area = steps.length ? `M${x(0)} ${y(0)}${stairs("blocks_held")}L${x(steps.length)} ${y(0)}Z` : "";
  svg.replaceChildren(
    draw("path", { d: area, fill: "var(--share-3)", "fill-opacity": ".55" }),
    draw("path", {
      d: stairs("blocks_separate").replace("L", "M"),
      fill: "none",
      stroke: "var(--mark)",
      "stroke-width": "1.5",
      "stroke-dasharray": "4 3",
    }),
    draw("line", { class: "cursor", y1: 0, y2: high, stroke: "var(--now)", "stroke-width": 2 }),
  );
}

// --------------------------------------------------------------------------------------------------- KV blocks

function rowsNow(focus) {
  const wanted = state.hover !== null && focus !== null ? nodes[focus].step : state.step;
  let step = Math.min(wanted, steps.length);
  while (step > 0 && !steps[step - 1].rows.length) step--;
  return { wanted, step: steps[step - 1] ?? null };
}

function tokensIn({ block, rows }) {
  const found = new Set();
  for (const row of rows) {
    const place = row.blocks.indexOf(block);
    if (place < 0) continue;
    for (const id of pathTo(row.node)) {
      if (Math.floor((promptLength + nodes[id].depth - 1) / run.block_size) === place) found.add(id);
    }
  }
  return found;
}

function showBlocks(focus) {
  const { wanted, step } = rowsNow(focus);
  const title = byId("blocks-title"),
    host = byId("blocks");
  title.textContent = step ? `KV blocks after step ${step.step}` : "KV blocks";
  if (!step) {
    host.replaceChildren(make("p", { class: "note" }, "No sequence went on after any step."));
    return;
  }
  if (step.step < wanted) title.textContent += `; all were returned in step ${wanted}`;
  const rows = [...step.rows].sort((a, b) => order.get(a.node) - order.get(b.node));
  const shares = new Map();
  for (const row of rows) for (const block of row.blocks) shares.set(block, (shares.get(block) ?? 0) + 1);
  const skipped = commonBlocks(rows);
  const table = make("table", {}, ...rows.map((row, i) => blockRow(row, i, rows, shares, skipped, focus)));
  table.classList.toggle("has-lit", table.querySelector("tr.lit") !== null);
  host.replaceChildren(table);
}

// Long prompts: leading blocks that every row shares are told as one cell.
function commonBlocks(rows) {
  let same = 0;
  while (rows.every((row) => row.blocks.length > same + 1 && row.blocks[same] === rows[0].blocks[same])) same++;
  return same > 8 ? same : 0;
}

function blockRow(row, place, rows, shares, skipped, focus) {
  const lit = focus !== null && hasAncestor(row.node, focus);
  const text = row.node === ROOT ? "" : tokenText(nodes[row.node]);
  const cells = row.blocks.map((block, i) => (i < skipped ? null : blockCell(row, i, place, rows, shares)));
  const joined = skipped ? [skippedCell(skipped, place, rows)] : [];
  return make(
    "tr",
    { class: lit ? "lit" : null },
    make(
      "th",
      { scope: "row", title: `sequence ${row.sequence}: score ${number(row.score)}` },
      make("b", {}, `seq ${row.sequence}`),
      `  ${shorten(text, 110)}`,
    ),
    ...[...joined, ...cells.filter(Boolean)].map((cell) => make("td", {}, cell)),
  );
}

function skippedCell(skipped, place, rows) {
  const classes = ["cell", `s${shade(rows.length)}`, place ? "joined" : "", place < rows.length - 1 ? "joins" : ""];
  return make(
    "div",
    { class: classes.join(" "), title: `${skipped} blocks that every row shares` },
    make("b", {}, `${skipped} blocks of the prompt`),
  );
}

const shade = (rows) =>
  rows <= 1 ? 0 : Math.min(5, 1 + Math.floor((4.999 * (rows - 1)) / Math.max(3, summary.most_rows - 1)));

function blockCell(row, i, place, rows, shares) {
  const block = row.blocks[i],
    sharing = shares.get(block);
  const above = rows[place - 1]?.blocks[i] === block,
    below = rows[place + 1]?.blocks[i] === block;
  const used = Math.min(run.block_size, row.cached - i * run.block_size),
    partial = used < run.block_size;
  const copied = partial && sharing > 1;
  const classes = ["cell", `s${shade(sharing)}`, above ? "joined" : "", below ? "joins" : "", copied ? "copied" : ""];
  const title = `block ${block}: ${used} of ${run.block_size} places filled; ${sharing === 1 ? "one row's own" : `shared by ${sharing} rows`}${copied ? "; copied before the next token is written" : ""}`;
  const cell = make(
    "div",
    { class: classes.filter(Boolean).join(" "), title, "data-block": block },
    partial ? make("span", { class: "rest", style: `width:${(100 * (1 - used / run.block_size)).toFixed(1)}%` }) : null,
    make("b", {}, String(block)),
  );
  cell.addEventListener("pointerenter", () => {
    state.block = { block, rows };
    markBlock(block);
  });
  cell.addEventListener("pointerleave", () => {
    state.block = null;
    markBlock(null);
  });
  return cell;
}

function markBlock(block) {
  for (const cell of byId("blocks").querySelectorAll(".cell"))
    cell.classList.toggle("same", block !== null && cell.dataset.block === String(block));
  const held = state.block === null ? new Set() : tokensIn(state.block);
  for (const box of view.boxes)
    box.group.classList.toggle(
      "held",
      box.ids.some((id) => held.has(id)),
    );
}

// ------------------------------------------------------------------------------------------ answers and the token

function drawAnswers() {
  byId("answers").replaceChildren(
    ...answers.map((answer, i) => {
      const facts = [
        answer.score !== null ? `score ${number(answer.score, 3)}` : null,
        answer.cumulative_logprob !== null ? `logprob ${number(answer.cumulative_logprob)}` : null,
        count(answer.num_tokens, "token"),
        answer.finish_reason,
      ];
      const button = make(
        "button",
        { type: "button" },
        make("span", { class: "rank" }, `#${i + 1}`),
        ...answerText(answer.text.trim() || "(no text)"),
        make("span", { class: "facts" }, facts.filter(Boolean).join(" · ")),
      );
      button.addEventListener("click", () => {
        if (answer.node !== ROOT) choose(answer.node);
      });
      return make("li", {}, button);
    }),
  );
  byId("answers-title").textContent = answers.length === 1 ? "Answer" : `Answers, best first`;
}

// Answers of one tree differ at their ends: of a long one the end is shown, and all of it when it is chosen.
function answerText(text) {
  if (text.length <= MOST_ANSWER) return [make("span", { class: "text" }, text)];
  return [
    make("span", { class: "text end" }, `…${text.slice(-MOST_ANSWER)}`),
    make("span", { class: "text whole" }, text),
  ];
}

function showAnswers(focus) {
  [...byId("answers").children].forEach((item, i) => {
    item.classList.toggle("chosen", state.node !== null && answers[i].node === state.node);
    item.classList.toggle("on", focus !== null && answers[i].node !== ROOT && hasAncestor(answers[i].node, focus));
  });
}

function showToken(focus) {
  const host = byId("token");
  if (focus === null) {
    host.replaceChildren(
      make("p", { class: "hint" }, "Point at a token to see its path, its odds and its blocks; click to keep it."),
    );
    return;
  }
  const node = nodes[focus],
    path = pathTo(focus);
  const total = path.reduce((sum, id) => (nodes[id].logprob === null ? NaN : sum + nodes[id].logprob), 0);
  const fate =
    node.status === "pruned"
      ? `died in step ${node.died}`
      : node.status === "ended"
        ? `ended: ${node.reason}${node.answer === null ? ", not returned" : `, answer #${node.answer + 1}`}`
        : gone.get(focus) < Infinity
          ? `all its branches had died by step ${gone.get(focus)}`
          : "goes on";
  const facts = [
    ["token id", node.token_id],
    ["probability", node.logprob === null ? null : `${percent(node.logprob)} (logprob ${number(node.logprob, 3)})`],
    ["path logprob", Number.isNaN(total) ? null : number(total, 3)],
    ["score", number(node.score, 3)],
    ["step, place", `${node.step}, ${node.depth}`],
    ["sequence", node.sequence],
    ["fate", fate],
  ];
  const before = readable(
    path
      .slice(0, -1)
      .map((id) => nodes[id].text)
      .join(""),
  );
  host.replaceChildren(
    make("span", { class: "big mono" }, tokenText(node)),
    make(
      "dl",
      {},
      ...facts
        .filter(([, value]) => value !== null)
        .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]),
    ),
    ...odds(node),
    make("h3", {}, "Path"),
    make(
      "p",
      { class: "path" },
      before.length > 400 ? `…${before.slice(-400)}` : before,
      make("mark", {}, readable(node.text)),
    ),
  );
}

function odds(node) {
  if (!node.alternatives.length) return [];
  const rows = node.alternatives.flatMap(([text, logprob]) => [
    make("span", { class: `word mono${logprob === node.logprob ? " on" : ""}` }, visible(text)),
    make("span", { class: "track" }, make("i", { style: `width:${(100 * Math.exp(logprob)).toFixed(1)}%` })),
    make("span", { class: "value" }, percent(logprob)),
  ]);
  return [make("h3", {}, "What the model thought likely here"), make("div", { class: "odds" }, ...rows)];
}

// ---------------------------------------------------------------------------------------------------- the header

function drawHeader() {
  document.title = `Folo trace: ${run.prompt.text.slice(0, 60)}`;
  byId("prompt").textContent = run.prompt.text || `${promptLength} prompt tokens`;
  byId("strategy").textContent = [run.strategy, run.model].filter(Boolean).join(" · ");
  const said = Object.entries(run.params ?? {}).filter(
    ([, value]) => value !== null && !(Array.isArray(value) && !value.length),
  );
  const params = said.map(([name, value]) => `${name} = ${JSON.stringify(value)}`);
  byId("params").replaceChildren(...params.map((text) => make("li", { class: "mono" }, text)));
  const ratio = summary.peak_blocks_separate / Math.max(1, summary.peak_blocks);
  const cards = [
    ["Steps", summary.steps, `${count(promptLength, "prompt token")}`],
    [
      "Tokens sampled",
      summary.tokens,
      `${summary.tokens_kept} kept (${Math.round((100 * summary.tokens_kept) / Math.max(1, summary.tokens))} %)`,
    ],
    ["Branches", summary.forks, `${summary.forks === 1 ? "fork" : "forks"}, ${summary.pruned} pruned`],
    ["KV blocks at the peak", summary.peak_blocks, `of ${run.block_size} tokens each`],
    ["As separate requests", summary.peak_blocks_separate, "blocks at the peak"],
    ["Sharing", `${ratio.toFixed(ratio < 10 ? 1 : 0)}×`, ratio > 1 ? "fewer blocks" : "nothing to share"],
  ];
  byId("stats").replaceChildren(
    ...cards.map(([name, value, more]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, String(value), " ", make("small", {}, more))),
    ),
  );
}

function swatch(style, label) {
  return make("span", {}, make("i", { style }), label);
}

function drawLegends() {
  const scale =
    "background:linear-gradient(90deg,color-mix(in srgb,var(--kept) 10%,var(--card)),color-mix(in srgb,var(--kept) 60%,var(--card)));border:1px solid var(--kept-line)";
  byId("tree-legend").replaceChildren(
    ...[
      swatch(scale, "token, darker is likelier"),
      swatch("background:color-mix(in srgb,var(--dead) 35%,var(--card));border:1px solid var(--dead)", "✕ died"),
      swatch("background:var(--best)", "answer"),
    ].map((entry) => make("li", {}, entry)),
  );
  byId("chart-legend").replaceChildren(
    swatch("background:var(--share-3)", "blocks in use"),
    swatch("border-top:2px dashed var(--mark);height:2px", "separate requests"),
    make("span", {}),
  );
  const shades = [0, 1, 2, 3, 4, 5].map((level) => `var(--share-${level})`).join(",");
  byId("blocks-legend").replaceChildren(
    swatch(
      `width:54px;background:linear-gradient(90deg,${shades})`,
      summary.most_rows > 1 ? `one row … shared by ${summary.most_rows}` : "one row",
    ),
    swatch(
      "background:var(--share-0);box-shadow:inset -9px 0 0 color-mix(in srgb,var(--card) 72%,var(--share-0));border:1px solid var(--line)",
      "partly filled",
    ),
    swatch(
      "background:repeating-linear-gradient(-45deg,var(--card) 0 3px,var(--mark) 3px 4px)",
      "shared tail: copied on write",
    ),
  );
}

// --------------------------------------------------------------------------------- address, keys, playing, theme

function remember() {
  const parts = [`step=${state.step}`];
  if (state.node !== null) parts.push(`node=${state.node}`);
  if (root.dataset.theme) parts.push(`theme=${root.dataset.theme}`);
  try {
    history.replaceState(null, "", `#${parts.join("&")}`);
  } catch {
    /* some viewers allow no change of address */
  }
}

function recall() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d+$/.test(wanted.get(name) ?? "") ? Number(wanted.get(name)) : null);
  if (["light", "dark"].includes(wanted.get("theme"))) root.dataset.theme = wanted.get("theme");
  if (wanted.has("fold")) state.fold = wanted.get("fold") === "1";
  state.step = Math.min(steps.length, whole("step") ?? steps.length);
  const node = whole("node");
  state.node = node !== null && node < nodes.length ? node : null;
  if (state.node !== null) openUpTo(state.node);
}

function openUpTo(id) {
  for (const at of pathTo(id)) if (!kept.get(at)) state.opened.add(nodes[at].parent);
}

function play(on) {
  clearInterval(state.playing);
  state.playing = null;
  if (on) {
    if (state.step >= steps.length) goTo(0);
    state.playing = setInterval(
      () => {
        goTo(state.step + 1);
        if (state.step >= steps.length) play(false);
      },
      Math.max(120, Math.min(600, 12000 / steps.length)),
    );
  }
  byId("play").setAttribute("aria-pressed", on);
  byId("play").replaceChildren(make("span", { "aria-hidden": "true" }, on ? "❚❚" : "▶"), on ? " Pause" : " Play");
}

function neighbour(key, at) {
  const box = view.boxOf.get(at);
  if (key === "ArrowLeft") return view.boxOf.get(nodes[box.ids[0]].parent);
  if (key === "ArrowRight") return view.boxOf.get(shownChildren(box.ids.at(-1))[0]);
  const middle = box.x + box.width / 2,
    down = key === "ArrowDown" ? 1 : -1;
  const others = view.boxes.filter((other) => (other.lane - box.lane) * down > 0);
  const far = (other) => Math.abs(other.lane - box.lane) * 60 + Math.abs(other.x + other.width / 2 - middle);
  return others.sort((a, b) => far(a) - far(b))[0];
}

function onTreeKey(event) {
  if (!event.key.startsWith("Arrow")) return;
  event.preventDefault();
  const at = state.node !== null && view.boxOf.has(state.node) ? state.node : null;
  const box = at === null ? view.boxes[0] : neighbour(event.key, at);
  if (box) focusBox(box);
}

function focusBox(box) {
  choose(box.ids.at(-1));
  for (const other of view.boxes) other.group.setAttribute("tabindex", other === box ? "0" : "-1");
  box.group.focus({ preventScroll: true });
}

function onKey(event) {
  if (event.key === "Escape") choose(null);
  const busy = event.target.closest("button");
  if (event.key === " " && !busy) {
    event.preventDefault();
    play(state.playing === null);
  }
  if (event.key === "Enter" && event.target.closest(".node"))
    event.target.closest(".node").dispatchEvent(new MouseEvent("click"));
}

function listenToPage() {
  byId("step").max = steps.length;
  byId("step").addEventListener("input", (event) => {
    play(false);
    goTo(Number(event.target.value));
  });
  byId("play").addEventListener("click", () => play(state.playing === null));
  byId("fold").addEventListener("click", () => {
    state.fold = !state.fold;
    state.opened.clear();
    redraw();
  });
  byId("expand").addEventListener("click", () => {
    state.expandAll = !state.expandAll;
    state.expanded.clear();
    redraw();
  });
  byId("theme").addEventListener("click", () => {
    const dark =
      (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "light" : "dark";
    remember();
  });
  byId("chart").addEventListener("click", (event) => {
    const { left, width: wide } = byId("chart").getBoundingClientRect();
    goTo(Math.ceil((steps.length * (event.clientX - left - 8)) / Math.max(1, wide - 16)));
  });
  byId("tree").addEventListener("keydown", onTreeKey);
  byId("scroll").addEventListener("click", (event) => {
    if (event.target.id === "tree" || event.target.id === "scroll") choose(null);
  });
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => {
    recall();
    redraw();
    reveal(state.node);
  });
  let pending = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => {
      drawChart();
      redraw();
    });
  });
}

recall();
drawHeader();
drawLegends();
drawAnswers();
drawChart();
listenToPage();
redraw();
if (view.boxes.length) view.boxes[0].group.setAttribute("tabindex", "0");
reveal(state.node);
root.dataset.ready = "1";
