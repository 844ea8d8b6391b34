(() => {
"use strict";
const $ = id => document.getElementById(id), root = document.documentElement, hover = $("hover");
const make = (tag, text, cls) => { const n = document.createElement(tag); if (text !== undefined) n.textContent = text; if (cls) n.className = cls; return n; };

// light and dark: the reader's choice stays for the visit
const stored = () => { try { return sessionStorage.getItem("theme"); } catch { return null; } };
if (stored()) root.dataset.theme = stored();
$("theme").onclick = () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { sessionStorage.setItem("theme", root.dataset.theme); } catch { /* a file opened without storage */ }
};

const place = (x, y) => {
  hover.hidden = false;
  const w = hover.offsetWidth, h = hover.offsetHeight;
  hover.style.left = Math.max(8, Math.min(x + 14, innerWidth - w - 8)) + "px";
  hover.style.top = (y + 18 + h > innerHeight ? Math.max(8, y - h - 12) : y + 18) + "px";
};
for (const tip of document.querySelectorAll(".tip")) {
  const show = () => { hover.textContent = tip.dataset.tip; const r = tip.getBoundingClientRect(); place(r.left, r.bottom - 12); };
  tip.onmouseenter = tip.onfocus = tip.onclick = show;
  tip.onmouseleave = tip.onblur = () => { hover.hidden = true; };
}
addEventListener("beforeprint", () => document.querySelectorAll("figure details.numbers").forEach(d => { d.open = true; }));

const island = $("data");
if (!island) return;
const D = JSON.parse(island.textContent), map = $("map"), rects = [...map.children], layers = D.layers;
const columns = Math.max(...layers.map(l => l.tokens.length), 1), byKey = Object.fromEntries(D.metrics.map(m => [m.key, m]));
const starts = []; layers.reduce((n, l) => { starts.push(n); return n + l.tokens.length; }, 0);
let metric = D.metrics.find(m => m.key === $("metric").value) || D.metrics[0], at = null;

const number = v => v === null || v === undefined ? "–" : v === 0 ? "0" : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(3));
const show = (m, v) => v === null || v === undefined ? "unmeasured" : m.unit === "%" ? +(100 * v).toPrecision(3) + "%" : m.unit === "x" ? number(v) + "×" : number(v) + (m.unit ? " " + m.unit : "");
const get = (l, e, key) => { const v = (layers[l].m[key] || [])[e]; return v === undefined ? null : v; };
const median = key => { const v = layers.flatMap(l => l.m[key] || []).filter(x => x !== null).sort((a, b) => a - b); return v.length ? v[v.length >> 1] : null; };

function paint() {
  const [lo, hi] = metric.range;
  $("experts").dataset.ramp = metric.good === "high" ? "high" : metric.good;
  layers.forEach((layer, l) => layer.tokens.forEach((_, e) => {
    const v = get(l, e, metric.key);
    rects[starts[l] + e].setAttribute("class", v === null ? "u" : "c" + Math.min(9, Math.max(0, Math.floor(10 * (v - lo) / (hi - lo || 1)))));
  }));
  $("lo").textContent = show(metric, lo); $("hi").textContent = show(metric, hi); $("meaning").textContent = metric.help;
  if ($("matrix").open) table();
}
$("metric").onchange = event => { metric = byKey[event.target.value]; paint(); };

function cell(event) {
  const r = map.getBoundingClientRect();
  const e = Math.floor((event.clientX - r.left) / r.width * columns), l = Math.floor((event.clientY - r.top) / r.height * layers.length);
  return l >= 0 && l < layers.length && e >= 0 && e < layers[l].tokens.length ? [l, e] : null;
}
function mark(l, e) {
  const c = $("cursor"); c.hidden = false;
  Object.assign(c.style, { left: e / columns * 100 + "%", top: l / layers.length * 100 + "%", width: 100 / columns + "%", height: 100 / layers.length + "%" });
}
map.onmousemove = event => {
  const c = cell(event);
  if (!c) { hover.hidden = true; return; }
  const [l, e] = c, L = layers[l];
  hover.replaceChildren(make("b", `Layer ${L.index} · expert ${e}`), make("span", `${metric.title}: ${show(metric, get(l, e, metric.key))}`), make("br"),
    make("span", [L.provenances[L.provenance[e]], `${L.tokens[e].toLocaleString("en")} tokens`].filter(Boolean).join(" · ")));
  mark(l, e); place(event.clientX, event.clientY);
};
map.onmouseleave = () => { hover.hidden = true; if (at) mark(...at); else $("cursor").hidden = true; };
map.onclick = event => { const c = cell(event); if (c) open(...c, true); };
map.onkeydown = event => {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Enter: [0, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [l, e] = at || [0, 0], y = Math.min(layers.length - 1, Math.max(0, l + step[0]));
  open(y, Math.min(layers[y].tokens.length - 1, Math.max(0, e + step[1])), true);
};

function bars(rows, style) {
  const box = make("div", undefined, "hb" + (style ? " " + style : "")), top = Math.max(...rows.map(r => r[1] || 0), 1e-9);
  for (const [name, v, text, cls] of rows) {
    const bar = make("div"), fill = make("i", undefined, cls); fill.style.width = Math.max(0, 100 * (v || 0) / top) + "%"; bar.append(fill);
    box.append(make("span", name), bar, make("span", text));
  }
  return box;
}
function open(l, e, keep) {
  at = [l, e]; mark(l, e);
  const L = layers[l], panel = $("expert"), left = make("div"), right = make("div"), cols = make("div", undefined, "cols");
  const close = make("button", "×", "close"); close.type = "button"; close.setAttribute("aria-label", "Close");
  close.onclick = () => { panel.hidden = true; at = null; $("cursor").hidden = true; history.replaceState(null, "", " "); };
  const facts = [L.provenances[L.provenance[e]], `${L.tokens[e].toLocaleString("en")} held-out tokens` + (L.blocks ? ` in ${L.blocks[e]} blocks` : "")];
  if (D.leastTokens && L.tokens[e] < D.leastTokens) facts.push(`unmeasured: fewer than ${D.leastTokens} tokens`);
  panel.replaceChildren(close, make("h3", `Layer ${L.index} · expert ${e}`), make("p", facts.filter(Boolean).join(" · "), "muted"), cols); cols.append(left, right);

  const numbers = make("table"), body = make("tbody"); numbers.append(body);
  for (const m of D.metrics) {
    const v = get(l, e, m.key), row = make("tr"), head = make("th", m.title), td = make("td", show(m, v)); head.scope = "row"; head.title = m.help;
    const [lows, highs] = L.between[m.key] || [[], []];
    if (lows[e] !== null && lows[e] !== undefined) td.append(make("small", `${show(m, lows[e])} to ${show(m, highs[e])}`));
    row.append(head, td, make("td", show(m, median(m.key)), "muted")); body.append(row);
  }
  const top = make("thead"), line = make("tr"); line.append(make("th", ""), make("th", "this expert"), make("th", "median")); top.append(line); numbers.prepend(top);
  left.append(make("h4", "The numbers"), numbers);

  const errors = [["student, before training", get(l, e, "error_before"), "s-before"], ["student, after training", get(l, e, "error_after"), "s-student"],
    ["no output", L.base.zero[e], "s-baseline"], ["mean output", L.base.mean[e], "s-baseline"], ["random FFN, fitted", L.base.random[e], "s-baseline"]].filter(r => r[1] !== null && r[1] !== undefined);
  if (errors.length) right.append(make("h4", "Block error on its tokens"), bars(errors.map(([n, v, c]) => [n, v, number(v), c])));
  if (D.domains.length > 1 && L.domainsOf[e]) {
    const rows = D.domains.map((d, i) => [d || "(no label)", L.domainsOf[e][i], D.domainShare[i] ? L.domainsOf[e][i] / D.domainShare[i] : null]).sort((a, b) => b[1] - a[1]).slice(0, 8);
    right.append(make("h4", "Its tokens by domain, and against chance"), bars(rows.map(([d, v, lift]) => [d, v, `${number(100 * v)}%  ${lift === null ? "" : number(lift) + "×"}`])));
    if (L.chance && L.chance[e]) right.append(make("p", `Shuffled domains give a lift of up to ${number(L.chance[e])}× in 95 of 100 cases.`, "muted"));
  }
  if (L.neurons_from) {
    const other = Object.entries(L.other_neurons || {}).filter(([, n]) => n).map(([k, n]) => `${n} ${k}`).join(", ");
    right.append(make("h4", "Its neurons in the student"), make("p", `${L.neurons_from[e]} neurons of this student layer come from this expert` + (other ? ` (others in the layer: ${other}).` : ".")));
  }
  const near = get(l, e, "replaceability");
  if (near !== null && L.replaced_by && L.replaced_by[e] >= 0) {
    const p = make("p", `Most alike: `), a = make("a", `expert ${L.replaced_by[e]}`); a.href = `#L${L.index}E${L.replaced_by[e]}`; p.append(a, ` (cosine ${number(near)})`); right.append(p);
  }
  const examples = (L.examples || [])[e] || [];
  if (examples.length) {
    const list = make("ul", undefined, "examples");
    for (const [before, token, after, domain] of examples) {
      const li = make("li"); li.append("…" + before, make("mark", token), after + "…", make("span", domain ? "  " + domain : "", "muted")); list.append(li);
    }
    panel.append(make("h4", "Tokens it answers most strongly"), list);
  }
  panel.hidden = false;
  if (keep) history.replaceState(null, "", `#L${L.index}E${e}`);
}
function follow() {
  const m = /^#L(\d+)E(\d+)$/.exec(location.hash);
  if (!m) return;
  const l = layers.findIndex(r => r.index === +m[1]);
  if (l >= 0 && +m[2] < layers[l].tokens.length) { open(l, +m[2], false); $("expert").scrollIntoView({ block: "nearest" }); }
}
addEventListener("hashchange", follow);

function table() {
  const t = make("table"), head = make("thead"), line = make("tr"), body = make("tbody"); line.append(make("th", "layer"));
  for (let e = 0; e < columns; e++) line.append(make("th", e));
  head.append(line);
  layers.forEach((L, l) => { const row = make("tr"); row.append(make("th", L.index)); L.tokens.forEach((_, e) => row.append(make("td", metric.unit === "%" && get(l, e, metric.key) !== null ? number(100 * get(l, e, metric.key)) : number(get(l, e, metric.key))))); body.append(row); });
  t.append(head, body); $("matrix").lastElementChild.replaceChildren(make("p", metric.title + (metric.unit === "%" ? ", per cent" : ""), "muted"), t);
}
$("matrix").ontoggle = () => { if ($("matrix").open) table(); };
$("csv").onclick = () => {
  const keys = D.metrics.map(m => m.key), lines = [["layer", "expert", "tokens", "provenance", ...keys].join(",")];
  layers.forEach((L, l) => L.tokens.forEach((n, e) => lines.push([L.index, e, n, L.provenances[L.provenance[e]] || "", ...keys.map(k => get(l, e, k) ?? "")].join(","))));
  const a = make("a"); a.href = URL.createObjectURL(new Blob([lines.join("\n")], { type: "text/csv" })); a.download = "experts.csv"; a.click(); URL.revokeObjectURL(a.href);
};
paint(); follow();
})();
