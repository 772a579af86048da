"use strict";
// Puts the pairs of the page into view: search, filters, order, links, keys. Whatever a row says goes in as text.
(() => {
  const $ = (id) => document.getElementById(id);
  const copy = (text, button) => {
    const done = (said) => {
      button.textContent = said;
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    };
    if (!navigator.clipboard) return done("not allowed here");
    navigator.clipboard.writeText(text).then(() => done("copied"), () => done("not allowed here"));
  };
  for (const button of document.querySelectorAll("button[data-copies]")) {
    button.hidden = false;
    button.addEventListener("click", () => copy($(button.dataset.copies).textContent, button));
  }
  if (!$("data")) return;

  const data = JSON.parse($("data").textContent);
  const [STEP, LONG] = [20, 2500];
  const sets = data.sets.map((set) => ({
    ...set,
    rows: set.pairs.map((pair, number) => ({
      ...pair,
      ...(data.principles[pair.principles] || {}),
      number,
      turns: data.prompts[pair.prompt],
      anchor: `${set.prefix}-${pair.id}`,
    })),
  }));
  if (data.dropped.length) {
    sets.push({
      name: "dropped rows", dropped: true, of: data.dropped_of,
      rows: data.dropped.map((row, number) => ({ ...row, number, anchor: `dropped-${number + 1}` })),
    });
  }
  let shown = [];
  let drawn = 0;
  let current = -1;

  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const add = (parent, ...children) => { parent.append(...children); return parent; };
  const set = () => sets[Number(document.querySelector("input[name=set]:checked").value)];

  // --- word differences: the longest common subsequence of words ---
  const wordsOf = (text) => text.match(/\S+\s*|^\s+/g) || [];
  const common = (first, second) => {
    const [a, b] = [first, second].map((words) => words.map((word) => word.trim()));
    if (a.length * b.length > 4e6) return null;
    const width = b.length + 1;
    const table = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i -= 1) {
      for (let j = b.length - 1; j >= 0; j -= 1) {
        table[i * width + j] = a[i] === b[j]
          ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
      }
    }
    const kept = [new Set(), new Set()];
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (a[i] === b[j]) { kept[0].add(i); kept[1].add(j); i += 1; j += 1; }
      else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i += 1;
      else j += 1;
    }
    return kept;
  };
  const marked = (node, words, kept, tag) => {
    for (let from = 0; from < words.length;) {
      let to = from;
      while (to < words.length && kept.has(to) === kept.has(from)) to += 1;
      const text = words.slice(from, to).join("");
      const word = text.trimEnd();
      if (kept.has(from) || !word) node.append(text);
      else node.append(make(tag, "", word), text.slice(word.length));
      from = to;
    }
  };

  // --- one row ---
  const textBox = (text) => {
    const node = make("div", "text", text);
    if (text.length > LONG) Object.assign(node, { tabIndex: 0, className: "text long" });
    return node;
  };
  const head = (row, title, value) => {
    const link = make("a", "", title);
    link.href = `#${encodeURIComponent(row.anchor)}`;
    const button = make("button", "", "copy");
    button.type = "button";
    button.setAttribute("aria-label", `copy ${title}`);
    button.addEventListener("click", () => copy(JSON.stringify(value, null, 2), button));
    return add(make("div", "head"), link, button);
  };
  const facts = (node, rows) => {
    const list = make("dl");
    for (const [name, value] of rows) if (value !== undefined && value !== "") add(list, make("dt", "", name), make("dd", "", value));
    if (list.children.length) node.append(list);
  };
  const side = (name, found) => {
    const said = [name, `${found.length} ${found.probability === undefined ? "words" : "tokens"}`];
    if (found.probability !== undefined) said.push(`on-policy probability ${found.probability.toFixed(3)}`);
    if (found.cut) said.push("cut off");
    if (found.why_not !== undefined) said.push(found.why_not ? `fails: ${found.why_not}` : "passes");
    return add(make("div", name), make("h3", "", said.join(" · ")));
  };
  const VERDICTS = { chosen: "chosen is better", rejected: "reversed: rejected is better", tie: "tie" };
  const pairCard = (row) => {
    const node = make("article");
    const { number, turns, anchor, prompt, principles, ...rest } = row;
    node.append(head(row, row.id, { prompt: turns.map(([role, content]) => ({ role, content })), ...rest }));
    for (const [role, content] of turns) node.append(add(make("div", "turn"), make("h3", "", role), textBox(content)));
    facts(node, [
      ["quality", row.quality], ["good principle", row.good], ["bad principle", row.bad],
      ["margin", row.margin === undefined ? undefined : `${row.margin.toFixed(3)} nats a token`],
      ["verdict", VERDICTS[row.verdict] || row.verdict],
    ]);
    const both = [["chosen", "ins", row.chosen], ["rejected", "del", row.rejected]];
    const words = both.map(([, , found]) => wordsOf(found.text));
    const kept = $("differences").checked ? common(...words) : null;
    const columns = both.map(([name, tag, found], index) => {
      const column = side(name, found);
      const text = textBox(found.text);
      if (kept) text.replaceChildren();
      if (kept) marked(text, words[index], kept[index], tag);
      return add(column, text);
    });
    return add(node, add(make("div", "pair"), ...columns));
  };
  const droppedCard = (row) => {
    const node = make("article");
    const { number, anchor, ...rest } = row;
    node.append(head(row, row.id, rest));
    if (row.query) node.append(textBox(row.query));
    facts(node, [["stage", row.stage], ["reason", row.reason], ["detail", row.detail]]);
    return node;
  };
  const draw = (upTo) => {
    const list = $("list");
    for (; drawn < Math.min(upTo, shown.length); drawn += 1) {
      const row = shown[drawn];
      const node = set().dropped ? droppedCard(row) : pairCard(row);
      node.id = row.anchor;
      node.tabIndex = -1;
      list.append(node);
    }
    $("more").hidden = drawn >= shown.length;
  };

  // --- which rows, in which order ---
  const text = (row) => {
    if (row.searched === undefined) {
      const found = set().dropped
        ? [row.id, row.query, row.stage, row.reason, row.detail]
        : [row.id, ...row.turns.map((turn) => turn[1]), row.chosen.text, row.rejected.text, row.good, row.bad];
      Object.defineProperty(row, "searched", { value: found.filter(Boolean).join("\n").toLowerCase() });
    }
    return row.searched;
  };
  const CUT = {
    none: (row) => !row.chosen.cut && !row.rejected.cut,
    any: (row) => row.chosen.cut || row.rejected.cut,
    chosen: (row) => row.chosen.cut,
    rejected: (row) => row.rejected.cut,
  };
  const CHECKS = {
    win: (row) => row.chosen.why_not === "" && Boolean(row.rejected.why_not),
    failed: (row) => Boolean(row.chosen.why_not),
    reversed: (row) => Boolean(row.chosen.why_not) && row.rejected.why_not === "",
  };
  const average = (row) => row.chosen.probability === undefined ? undefined : (row.chosen.probability + row.rejected.probability) / 2;
  const ORDERS = {
    file: (row) => row.number,
    margin: (row) => row.margin,
    length: (row) => row.chosen.length,
    longer: (row) => row.chosen.length - row.rejected.length,
    probability: average,
  };
  const verdictOf = (row) => row.verdict === undefined ? "none" : VERDICTS[row.verdict] ? row.verdict : "none";
  const valueOf = (id) => $(id) ? $(id).value : "";
  const wanted = (row) => {
    const [search, reason, quality, cut, verdict, checks] = ["search", "reason", "quality", "cut", "verdict", "checks"].map(valueOf);
    if (search && !text(row).includes(search.toLowerCase())) return false;
    if (set().dropped) return !reason || row.reason === reason;
    return (!quality || row.quality === quality) && (!cut || CUT[cut](row))
      && (!verdict || verdictOf(row) === verdict) && (!checks || CHECKS[checks](row));
  };
  const show = () => {
    const rows = set().rows.filter(wanted);
    const [name, way] = $("sort").value.split(" ");
    const value = set().dropped ? ORDERS.file : ORDERS[name];
    const sign = way === "down" && !set().dropped ? -1 : 1;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (x - y) || a.number - b.number;
    });
    shown = rows;
    drawn = 0;
    current = -1;
    $("list").replaceChildren();
    for (const node of document.querySelectorAll("#controls .of-pairs")) node.hidden = Boolean(set().dropped);
    for (const node of document.querySelectorAll("#controls .of-dropped")) node.hidden = !set().dropped;
    const here = set().rows.length;
    const whole = set().of > here ? `, a sample of ${set().of.toLocaleString("en")}` : "";
    $("count").textContent = `${rows.length.toLocaleString("en")} of ${here.toLocaleString("en")}${whole}`;
    draw(STEP);
  };
  const options = (id, values) => {
    for (const value of [...new Set(values.filter(Boolean))].sort()) {
      const option = make("option", "", value);
      option.value = value;
      $(id).append(option);
    }
  };

  // --- links and keys ---
  const goTo = (number, link) => {
    if (number < 0 || number >= shown.length) return;
    current = number;
    draw(number + 1 > drawn ? number + STEP : drawn);
    const node = $("list").children[number];
    if (link) history.replaceState(null, "", `#${encodeURIComponent(shown[number].anchor)}`);
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "start" });
  };
  const follow = () => {
    let anchor;
    try { anchor = decodeURIComponent(location.hash.slice(1)); } catch { return; }
    const where = sets.findIndex((each) => each.rows.some((row) => row.anchor === anchor));
    if (where < 0) return;
    const place = () => shown.findIndex((row) => row.anchor === anchor);
    if (sets[where] !== set() || place() < 0) {
      $("controls").reset();
      document.querySelector(`input[name=set][value="${where}"]`).checked = true;
      show();
    }
    goTo(place(), false);
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=radio]):not([type=checkbox]), select, textarea");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") goTo(current + 1, true);
    if (event.key === "k") goTo(Math.max(current - 1, 0), true);
    if (event.key === "/") { event.preventDefault(); $("search").focus(); }
  });
  window.addEventListener("hashchange", follow);

  sets.forEach((each, number) => {
    const input = make("input");
    Object.assign(input, { type: "radio", name: "set", value: number, defaultChecked: number === 0 });
    $("sets").append(add(make("label"), input, ` ${each.name} (${each.of.toLocaleString("en")})`));
  });
  const pairs = sets.filter((each) => !each.dropped).flatMap((each) => each.rows);
  options("quality", pairs.map((row) => row.quality));
  options("reason", data.dropped.map((row) => row.reason));
  const empty = {
    quality: pairs.every((row) => !row.quality),
    verdict: pairs.every((row) => row.verdict === undefined),
    checks: pairs.every((row) => row.chosen.why_not === undefined),
  };
  for (const [id, nothing] of Object.entries(empty)) if (nothing) $(id).closest("label").remove();
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("controls").addEventListener("input", show);
  $("clear").addEventListener("click", () => { $("controls").reset(); show(); });
  $("more").addEventListener("click", () => { const first = drawn; draw(drawn + STEP); goTo(first, false); });
  $("controls").hidden = false;
  show();
  follow();
})();
