"use strict";

// ---- the table of classes

const table = document.getElementById("classes");
const classFilter = document.getElementById("class-filter");
const rows = [...table.tBodies[0].rows];

function sort(header) {
  const numeric = "number" in header.dataset;
  const first = numeric ? "descending" : "ascending";
  const second = numeric ? "ascending" : "descending";
  const direction = header.getAttribute("aria-sort") === first ? second : first;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const value = row => {
    const cell = row.cells[header.cellIndex];
    return numeric ? parseFloat(cell.dataset.value) : cell.textContent;
  };
  const compare = (a, b) => {
    if (!numeric) return sign * a.localeCompare(b);
    return Number.isNaN(a) - Number.isNaN(b) || sign * (a - b) || 0; // rows without a number come last
  };
  table.tBodies[0].append(...rows.sort((a, b) => compare(value(a), value(b))));
}

function filterClasses() {
  const { name, kind, count } = classFilter.elements;
  const words = name.value.trim().toLowerCase();
  let shown = 0;
  for (const row of rows) {
    const fits = row.cells[0].textContent.toLowerCase().includes(words);
    row.hidden = !fits || (kind.value !== "" && row.dataset.kind !== kind.value);
    shown += row.hidden ? 0 : 1;
  }
  count.value = `${shown} of ${rows.length} classes`;
}

for (const header of table.tHead.rows[0].cells) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  header.append(button);
  button.addEventListener("click", () => sort(header));
}
classFilter.addEventListener("input", filterClasses);
classFilter.addEventListener("submit", event => event.preventDefault());
classFilter.hidden = false;
filterClasses();

// ---- the images

const imageFilter = document.getElementById("image-filter");
const container = document.getElementById("figures");
const pages = document.getElementById("pages");
const viewer = document.getElementById("viewer");
const figures = container ? [...container.children] : [];
const facts = new Map(figures.map(figure => [figure, JSON.parse(figure.dataset.facts)]));
let listed = []; // the figures that fit the filter, in order
let start = 0; // the first on this page
let current = 0; // the one in the viewer
let picture = "input";

/** Give a picture its content; return null while that is not loaded yet. */
function source(figure, kind) {
  const image = figure.querySelector(`[data-picture="${kind}"] img`);
  if (image && !image.hasAttribute("src")) {
    const stored = document.getElementById(`${kind}-${facts.get(figure).place}`);
    if (stored && stored.nextSibling) image.src = "data:image/jpeg;base64," + stored.textContent;
  }
  return image && image.getAttribute("src");
}

function key(figure, order, chosen, cause) {
  const { place, pq, difference, loss, classes } = facts.get(figure);
  if (order === "all") return place;
  if (order === "lost" || order === "gained") return difference;
  if (cause !== "") return -loss[cause];
  return chosen === "" ? pq : classes[chosen][0];
}

function fits(figure, chosen, cause) {
  const { loss, classes } = facts.get(figure);
  if (chosen === "") return cause === "" || loss[cause] > 0;
  return chosen in classes && (cause === "" || classes[chosen][1].includes(cause));
}

function list() {
  const { order, class: chosen, cause, count } = imageFilter.elements;
  const sign = order.value === "best" || order.value === "gained" ? -1 : 1;
  const ranked = figures
    .filter(figure => fits(figure, chosen.value, cause.value))
    .map(figure => [key(figure, order.value, chosen.value, cause.value), figure]);
  const missing = value => (Number.isFinite(value) ? 0 : 1);
  ranked.sort(([a], [b]) => missing(a) - missing(b) || sign * (a - b) || 0);
  listed = ranked.map(([, figure]) => figure);
  let by = "";
  if (order.value === "worst" || order.value === "best") {
    if (cause.value !== "") by = ", by points lost to this error";
    else if (chosen.value !== "") by = ", by PQ of this class";
  }
  count.value = `${listed.length} of ${figures.length} images${by}`;
  show(0);
}

function show(first) {
  const size = Number(container.dataset.size);
  start = first;
  const shown = new Set(listed.slice(start, start + size));
  for (const figure of figures) figure.hidden = !shown.has(figure);
  container.append(...shown);
  draw();
  pages.hidden = listed.length <= size;
  pages.querySelector("output").value = `${start + 1} to ${start + shown.size} of ${listed.length}`;
  pages.querySelector('[name="previous"]').disabled = start === 0;
  pages.querySelector('[name="next"]').disabled = start + size >= listed.length;
}

function draw() {
  for (const figure of figures)
    if (!figure.hidden)
      for (const button of figure.querySelectorAll("[data-picture]")) source(figure, button.dataset.picture);
}

function turn(direction) {
  show(start + direction * Number(container.dataset.size));
  document.getElementById("images").scrollIntoView();
}

// ---- the viewer

function view(index, kind) {
  current = Math.min(Math.max(index, 0), listed.length - 1);
  const figure = listed[current];
  const image = viewer.querySelector("img");
  picture = figure.querySelector(`[data-picture="${kind}"]`) ? kind : "prediction";
  const original = figure.querySelector(`[data-picture="${picture}"] img`);
  image.alt = original.alt;
  const address = source(figure, picture);
  if (address) image.src = address;
  else image.removeAttribute("src");
  for (const button of viewer.querySelectorAll("[aria-pressed]")) {
    button.setAttribute("aria-pressed", button.name === picture);
    button.disabled = !figure.querySelector(`[data-picture="${button.name}"]`);
  }
  viewer.querySelector('[name="previous"]').disabled = current === 0;
  viewer.querySelector('[name="next"]').disabled = current === listed.length - 1;
  viewer.querySelector(".place").textContent = `${current + 1} of ${listed.length}`;
  viewer.querySelector(".about").replaceChildren(figure.querySelector("figcaption").cloneNode(true));
  if (viewer.open) return;
  viewer.showModal();
  viewer.focus(); // not its first button
}

function closed() {
  const size = Number(container.dataset.size);
  show(Math.floor(current / size) * size); // where the viewer was left
  listed[current].querySelector(`[data-picture="${picture}"]`).focus();
}

function press(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const chosen = [...viewer.querySelectorAll("[aria-pressed]")][Number(event.key) - 1];
  if (event.key === "ArrowLeft") view(current - 1, picture);
  else if (event.key === "ArrowRight") view(current + 1, picture);
  else if (chosen && !chosen.disabled) view(current, chosen.name);
  else return;
  event.preventDefault();
}

function click(event) {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.name === "previous") view(current - 1, picture);
  else if (button.name === "next") view(current + 1, picture);
  else if (button.name === "close") viewer.close();
  else view(current, button.name);
}

if (container) {
  imageFilter.addEventListener("change", list);
  imageFilter.addEventListener("submit", event => event.preventDefault());
  pages.querySelector('[name="previous"]').addEventListener("click", () => turn(-1));
  pages.querySelector('[name="next"]').addEventListener("click", () => turn(1));
  container.addEventListener("click", event => {
    const button = event.target.closest("[data-picture]");
    if (button) view(listed.indexOf(button.closest("figure")), button.dataset.picture);
  });
  table.addEventListener("click", event => {
    const link = event.target.closest("[data-class]");
    if (!link) return;
    imageFilter.elements.class.value = link.dataset.class;
    list();
  });
  viewer.addEventListener("keydown", press);
  viewer.addEventListener("click", click);
  viewer.addEventListener("close", closed);
  document.addEventListener("DOMContentLoaded", () => {
    draw();
    if (viewer.open) view(current, picture);
  });
  imageFilter.hidden = false;
  list();
}
