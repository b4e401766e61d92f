// A picture of a mesh: ranks as boxes, in frames by the mesh's axes. It only draws; what it shows is given to it.
const SVG = "http://www.w3.org/2000/svg";
const MOST_BOXES = 32; // of more, one group stands for all
const MOST_OF_AN_AXIS = 16; // of an axis that is longer than that by itself, so many are drawn
const GAP = 4;
const PADDING = 6;
const TITLE = 15;
const LETTER = 6; // px, about, of a letter of 10 px
// What the positions on an axis are called, where not by its name and a number.
const POSITIONS = {
  cfg: (at) => ["cond", "uncond"][at] ?? String(at),
  pp: (at) => `stage ${at}`,
  patch: (at) => `band ${at}`,
};
const COLOURS = {
  text: "var(--input-text, #ddd)",
  faint: "var(--descrip-text, #999)",
  line: "var(--border-color, #555)",
  box: "var(--comfy-input-bg, #222)",
  plenty: "var(--p-green-500, #22a355)",
  most: "var(--p-amber-500, #d9920a)",
  full: "var(--p-red-500, #e0443e)",
};

/**
 * @param {{rank: number, label: string, detail?: string, fill?: number | null, title?: string}[]} ranks in the order of their
 *   numbers; `fill` is the part of its memory that is taken, 0 to 1, or null for no bar; `title` is shown under the pointer.
 * @param {{name: string, size: number}[]} axes outer to inner, sizes above 1 only; where their product is not the number of
 *   ranks, the ranks stand in one frame without a name.
 * @param {number} widest px; what would be wider is broken into rows.
 * @returns {SVGElement} at its own size, and narrower where its place is.
 */
export function meshPicture(ranks, axes, widest = 400) {
  const fits = axes.length > 0 && product(axes) === ranks.length;
  const drawn = fits ? [...axes] : [{ name: "", size: ranks.length }];
  const folded = [];
  while (drawn.length > 1 && product(drawn) > MOST_BOXES) folded.push(drawn.shift());
  const group = frame(drawn, ranks.slice(0, product(drawn)), "", { ...boxSize(ranks), widest });
  const groups = product(folded);
  const note = groups > 1 ? `x ${groups} (${folded.map((axis) => `${axis.name} ${axis.size}`).join(", ")})` : "";
  const width = Math.max(group.width, textWidth(note));
  const height = group.height + (note ? TITLE : 0);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  svg.setAttribute("aria-label", describe(ranks.length, axes));
  svg.style.cssText = "display: block; max-width: 100%; height: auto; font: 10px sans-serif;";
  svg.append(placed(group, 0, 0));
  if (note) svg.append(text(note, 1, height - 4, COLOURS.text));
  return svg;
}

function product(axes) {
  return axes.reduce((size, axis) => size * axis.size, 1);
}

function describe(count, axes) {
  const named = axes.map((axis) => `${axis.name} ${axis.size}`).join(", ");
  return `${count} ranks${named ? `: ${named}` : ""}`;
}

function boxSize(ranks) {
  const longest = Math.max(...ranks.flatMap((rank) => [rank.label, rank.detail ?? ""]).map(textWidth));
  const bar = ranks.some((rank) => rank.fill != null) ? 7 : 0;
  const detail = ranks.some((rank) => rank.detail) ? 12 : 0;
  return { width: Math.max(34, longest + 10), height: 21 + detail + bar };
}

/** A frame with the positions of the first of `axes` in it: boxes of the size `box` where it is the last one, else frames. */
function frame(axes, ranks, name, box) {
  const [axis, ...inner] = axes;
  const each = ranks.length / axis.size;
  const places = Array.from({ length: axis.size }, (_, at) => at);
  const title = [name, inner.length ? "" : titleOf(axis)].filter(Boolean).join(" · ");
  const inside = { ...box, widest: box.widest - 2 * PADDING };
  const children = inner.length
    ? places.map((at) => frame(inner, ranks.slice(at * each, (at + 1) * each), position(axis, at), inside))
    : boxes(ranks, box);
  return framed(title, children, inside.widest);
}

function position(axis, at) {
  const name = POSITIONS[axis.name]?.(at);
  return name ? `${axis.name}: ${name}` : `${axis.name} ${at}`;
}

function titleOf(axis) {
  if (!axis.name) return "";
  if (axis.name === "cfg") return "cfg: cond | uncond";
  const of = { pp: "pp: stages", patch: "patch: bands" }[axis.name] ?? axis.name;
  return `${of} 0..${axis.size - 1}`;
}

function boxes(ranks, size) {
  if (ranks.length <= MOST_BOXES) return ranks.map((rank) => rankBox(rank, size));
  const more = { label: `+ ${ranks.length - MOST_OF_AN_AXIS}`, title: "more ranks, of the same axis" };
  return [...ranks.slice(0, MOST_OF_AN_AXIS), more].map((rank) => rankBox(rank, size));
}

function rankBox({ label, detail, fill, title }, { width, height }) {
  const g = element("g", {});
  if (title) g.append(named("title", title));
  g.append(element("rect", { width, height, rx: 3, fill: COLOURS.box, stroke: COLOURS.line }));
  g.append(text(label, width / 2, detail || fill != null ? 13 : height / 2 + 4, COLOURS.text, "middle"));
  if (detail) g.append(text(detail, width / 2, 25, COLOURS.faint, "middle"));
  if (fill != null) g.append(...bar(Math.min(1, Math.max(0, fill)), width, height));
  return { g, width, height };
}

function bar(part, width, height) {
  const colour = part > 0.95 ? COLOURS.full : part > 0.8 ? COLOURS.most : COLOURS.plenty;
  const place = { x: 4, y: height - 7, height: 4, rx: 2 };
  return [
    element("rect", { ...place, width: width - 8, fill: COLOURS.line }),
    element("rect", { ...place, width: (width - 8) * part, fill: colour }),
  ];
}

/** Children side by side as far as there is room, each in as much as the widest of them needs. */
function framed(title, children, widest) {
  const [width, height] = ["width", "height"].map((side) => Math.max(...children.map((child) => child[side])));
  const columns = Math.max(1, Math.min(children.length, Math.floor((widest + GAP) / (width + GAP))));
  const rows = Math.ceil(children.length / columns);
  const top = title ? TITLE : PADDING;
  const own = {
    width: Math.max(columns * (width + GAP) - GAP, textWidth(title)) + 2 * PADDING,
    height: top + rows * (height + GAP) - GAP + PADDING,
  };
  const g = element("g", {});
  const line = element("rect", { x: 0.5, y: 0.5, width: own.width - 1, height: own.height - 1, rx: 4 });
  line.style.cssText = `fill: none; stroke: ${COLOURS.line}`;
  g.append(line);
  if (title) g.append(text(title, PADDING, 11, COLOURS.faint));
  children.forEach((child, at) => {
    child.line?.setAttribute("width", width - 1);
    const x = PADDING + (at % columns) * (width + GAP);
    g.append(placed(child, x, top + Math.floor(at / columns) * (height + GAP)));
  });
  return { g, line, ...own };
}

function placed({ g }, x, y) {
  g.setAttribute("transform", `translate(${x} ${y})`);
  return g;
}

function textWidth(words) {
  return Math.ceil(words.length * LETTER);
}

function text(words, x, y, fill, anchor = "start") {
  const made = named("text", words);
  for (const [name, value] of Object.entries({ x, y, fill, "text-anchor": anchor })) made.setAttribute(name, value);
  return made;
}

function named(tag, words) {
  const made = element(tag, {});
  made.textContent = words;
  return made;
}

function element(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
