// The dashboard: reads snapshots from /dashboard/events and draws them. All text is set as text, never as HTML.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const find = (id) => document.getElementById(id);
let key = sessionStorage.getItem("retrieval-draft-key") || "";

const headers = (more = {}) => (key ? { ...more, Authorization: `Bearer ${key}` } : more);
const short = (value, digits = 1) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const count = (value) => value.toLocaleString("en");

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.textContent = text;
  return made;
}

// Server-sent events over fetch, as EventSource cannot send a key.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

function say(text, kind) {
  find("status").textContent = text;
  find("status").className = `pill ${kind}`;
}

async function watch() {
  for (;;) {
    try {
      const response = await fetch("/dashboard/events", { headers: headers(), cache: "no-store" });
      if (response.status === 401) {
        ask_key(key ? "That key is not known." : "");
        return;
      }
      if (!response.ok) throw new Error(String(response.status));
      find("login").hidden = true;
      find("main").hidden = false;
      for await (const data of events(response)) show(JSON.parse(data));
    } catch (error) {
      if (!(error instanceof TypeError)) console.warn("the feed ended:", error.message);
    }
    say("not connected", "bad");
    await new Promise((done) => setTimeout(done, 2000));
  }
}

function ask_key(said) {
  find("login").hidden = false;
  find("main").hidden = true;
  find("login-said").textContent = said;
  say("locked", "");
  find("key").focus();
}

function show(state) {
  find("model").textContent = state.model;
  say(state.status, state.ok ? "ok" : "bad");
  const rates = state.rates;
  const plain = rates.plain_tokens_per_second;
  find("rate").textContent = short(rates.tokens_per_second);
  find("plain").textContent = short(plain);
  find("ratio").textContent = plain ? `${short(rates.tokens_per_second / plain, 2)}×` : "–";
  find("per-step").textContent = short(rates.tokens_per_step, 2);
  find("acceptance").textContent = state.drafted ? `${short((100 * state.accepted) / state.drafted)} %` : "–";
  curve(rates.curve);
  bars(find("by-source"), state.by_source);
  bars(find("by-level"), state.by_level);
  times(state.seconds);
  const ended = Object.entries(state.ended).map(([reason, number]) => `${count(number)} ${reason}`);
  list(find("work"), [
    ["rows in the batch", count(state.running)],
    ["waiting", count(state.waiting)],
    ["ended", ended.join(", ") || "none"],
    ["tokens", count(state.tokens)],
    ["prompt tokens", count(state.prompt_tokens)],
    ["not read again", state.prompt_tokens ? `${short((100 * state.cached_tokens) / state.prompt_tokens)} %` : "–"],
    ["drafted nodes", count(state.drafted)],
    ["accepted", count(state.accepted)],
  ]);
  const store = state.store;
  list(find("store"), store === null ? [["none", "drafts come from here"]] : [
    ["state", store.state],
    ["servers", count(store.servers)],
    ["entries", count(store.entries)],
    ["tokens", count(store.tokens)],
    ["sent, received", `${count(store.sent)}, ${count(store.received)}`],
    ["waiting, dropped", `${count(store.waiting)}, ${count(store.dropped)}`],
  ]);
  draw(state.tree);
}

function list(place, entries) {
  place.replaceChildren(...entries.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

function bars(table, rows) {
  const most = Math.max(1, ...rows.map((row) => row[2]));
  table.replaceChildren(
    ...rows.map(([name, drafted, accepted]) => {
      const line = document.createElement("tr");
      const meter = document.createElement("meter");
      meter.max = most;
      meter.value = accepted;
      meter.title = `${count(accepted)} of ${count(drafted)} drafted`;
      const middle = document.createElement("td");
      middle.append(meter);
      line.append(element("td", name), middle, element("td", `${count(accepted)} of ${count(drafted)}`));
      return line;
    }),
  );
  if (!rows.length) table.replaceChildren(element("caption", "nothing drafted yet", "quiet"));
}

function times(seconds) {
  const entries = Object.entries(seconds);
  const all = entries.reduce((sum, [, value]) => sum + value, 0) || 1;
  find("times").replaceChildren(
    ...entries.map(([name, value], number) => {
      const part = element("span", "", `c${number}`);
      part.style.flexGrow = value / all;
      part.title = `${name}: ${short((100 * value) / all)} %`;
      return part;
    }),
  );
  find("times-legend").replaceChildren(
    ...entries.flatMap(([name, value], number) => [
      element("i", "", `swatch c${number}`),
      element("span", `${name} ${short((100 * value) / all)} %`),
    ]),
  );
}

function curve(points) {
  const place = find("curve");
  const highest = 1.1 * Math.max(1, ...points.flatMap(([, rate, plain]) => [rate, plain || 0]));
  const at = (age, value) => `${(10 * (age + 90)).toFixed(1)} ${(118 - (114 * value) / highest).toFixed(1)}`;
  const line = (column) => {
    let drawn = "";
    let before = null;
    for (const point of points) {
      if (point[column] === null) continue;
      drawn += `${before !== null && point[0] - before <= 3 ? "L" : "M"}${at(point[0], point[column])}`;
      before = point[0];
    }
    return drawn;
  };
  place.replaceChildren(
    shape("line", { x1: 0, x2: 900, y1: 118, y2: 118 }),
    shape("path", { class: "grey", d: line(2) }),
    shape("path", { class: "accent", d: line(1) }),
  );
}

// Depth goes to the right; every leaf has a line of its own.
function draw(tree) {
  const place = find("tree");
  if (tree === null) {
    find("tree-said").textContent = "none yet";
    return;
  }
  const nodes = tree.nodes.map((node) => ({ ...node, children: [] }));
  nodes.forEach((node, number) => {
    node.depth = node.parent < 0 ? 0 : nodes[node.parent].depth + 1;
    if (number > 0) nodes[Math.max(0, node.parent)].children.push(node);
  });
  if (tree.bonus !== null) {
    const end = nodes.filter((node) => node.accepted).pop() || nodes[0];
    const bonus = { text: tree.bonus, prob: null, bonus: true, children: [], depth: end.depth + 1, sources: [] };
    end.children.unshift(bonus);
    nodes.push(bonus);
  }
  let line = 0;
  const settle = (node) => {
    node.children.sort((a, b) => Number(Boolean(b.accepted || b.bonus)) - Number(Boolean(a.accepted || a.bonus)));
    node.line = node.children.length ? line : line++;
    node.children.forEach(settle);
  };
  settle(nodes[0]);
  const widths = [];
  for (const node of nodes) {
    node.shown = visible(node.text);
    widths[node.depth] = Math.max(widths[node.depth] || 0, 14 + 7.3 * [...node.shown].length);
  }
  const lefts = [2];
  widths.forEach((width, depth) => lefts.push(lefts[depth] + width + 22));
  const middle = (node) => 13 + 25 * node.line;
  const edges = [];
  const boxes = [];
  for (const node of nodes) {
    const kind = node.bonus ? "bonus" : node.accepted ? "accepted" : "";
    const left = lefts[node.depth];
    const width = 14 + 7.3 * [...node.shown].length;
    for (const child of node.children) {
      const from = left + width;
      const to = lefts[child.depth];
      const bend = to - 11;
      edges.push(shape("path", {
        class: child.bonus ? "bonus" : child.accepted ? "accepted" : "",
        d: `M${from} ${middle(node)}H${bend - 8}C${bend} ${middle(node)} ${bend - 6} ${middle(child)} ${to} ${middle(child)}`,
      }));
    }
    const box = shape("g", { class: kind, opacity: kind ? 1 : 0.4 + 0.6 * Math.sqrt(node.prob) });
    box.append(
      shape("rect", { x: left, y: middle(node) - 10, width, height: 20, rx: 5 }),
      shape("text", { x: left + 7, y: middle(node) + 4 }, node.shown),
      shape("title", {}, node.bonus ? "said by the model itself" : `${(100 * node.prob).toFixed(1)} %  ${node.sources.join(", ")}`),
    );
    boxes.push(box);
  }
  const width = lefts[lefts.length - 1];
  const height = 25 * Math.max(1, line) + 4;
  place.setAttribute("viewBox", `0 0 ${width} ${height}`);
  place.setAttribute("width", width);
  place.setAttribute("height", height);
  place.replaceChildren(...edges, ...boxes);
  find("tree-said").textContent = `${tree.accepted} of ${tree.size} nodes accepted`;
}

function visible(text) {
  const plain = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "·");
  const letters = [...plain];
  return letters.length > 14 ? `${letters.slice(0, 13).join("")}…` : plain || "∅";
}

let running = null;

async function generate(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  find("run").disabled = true;
  find("stop").hidden = false;
  find("reply").replaceChildren();
  const began = performance.now();
  let said = "";
  let drafted = 0;
  let all = 0;
  try {
    const response = await fetch("/v1/completions", {
      method: "POST",
      signal: running.signal,
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify({
        prompt: find("prompt").value,
        max_tokens: Number(find("max-tokens").value),
        temperature: Number(find("temperature").value),
        stream: true,
        draft_marks: true,
        stream_options: { include_usage: true },
        metrics: true,
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      for (const mark of piece.draft_marks || []) {
        all += mark.text.length;
        if (mark.drafted) drafted += mark.text.length;
        find("reply").append(mark.drafted ? element("mark", mark.text, "drafted") : mark.text);
      }
      find("reply").scrollTop = find("reply").scrollHeight;
      if (piece.usage) {
        const tokens = piece.usage.completion_tokens;
        said = `${tokens} tokens in ${((performance.now() - began) / 1000).toFixed(1)} s`;
      }
    }
    if (all) said += `, ${Math.round((100 * drafted) / all)} % of the text was drafted`;
  } catch (error) {
    said = error.name === "AbortError" ? "stopped" : error.message;
  }
  find("ask-said").textContent = said;
  find("run").disabled = false;
  find("stop").hidden = true;
  running = null;
}

find("ask").addEventListener("submit", generate);
find("stop").addEventListener("click", () => running && running.abort());
find("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value;
  sessionStorage.setItem("retrieval-draft-key", key);
  find("key").value = "";
  watch();
});
watch();
