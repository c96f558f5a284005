"use strict";
// Names come from files and people: they are only ever set as text, never as markup.

const at = (id) => document.getElementById(id);
const many = (count, one, more = one + "s") => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;
const link = (view, values) => `#${view}` + (values ? `?${new URLSearchParams(values)}` : "");
const views = ["search", "classes", "class", "enrol"];
let about = null;  // what the server says of itself
let asked = null;  // the image that was dropped, a File
let answered = null;  // the last one of these that was no mistake
let chosen = [];   // the images to enrol, Files
let latest = new AbortController();  // of the view that is being filled

function made(tag, values = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(values)) {
    if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("No answer from the server: is fedss serve still running?");
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(content.error || `The server answered ${answer.status}.`), { refused: answer.status < 500 });
  return content;
}

function show(failure) {
  at("failure").textContent = failure || "";
  at("failure").hidden = !failure;
  if (failure) at("failure").scrollIntoView({ block: "nearest" });
}

// What a person asked for; what it raises is shown, unless something newer was asked for.
async function attempt(work) {
  show("");
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") show(error.message);
  }
}

function score(value, threshold = null) {
  const percent = (part) => `${100 * Math.min(1, Math.max(0, part))}%`;
  const fill = made("span", { className: "fill" });
  fill.style.width = percent(value);
  const track = made("span", { className: "track", "aria-hidden": "true" }, fill);
  if (threshold !== null) {
    const tick = made("span", { className: "tick" });
    tick.style.left = percent(threshold);
    track.append(tick);
  }
  return made("span", { className: "score" }, track, made("span", { className: "number" }, value.toFixed(3)));
}

// A name in a sentence: letters from right to left do not turn what follows.
const named = (name) => made("bdi", {}, name);

function thumbnail(image) {
  return made("img", { src: `thumbnail/${image.position}`, alt: "", loading: "lazy" });
}

function badge(item) {
  return item.enrolled ? [made("span", { className: "badge" }, "enrolled")] : [];
}

function className({ label }) {
  if (label === null) return made("span", { className: "name none" }, "no class");
  return made("a", { className: "name", href: link("class", { name: label }), title: label }, label);
}

// The file's name leads to the file; of an enrolled image none is kept.
function fileName(image) {
  const name = image.name.split("/").pop();
  if (image.enrolled) return made("span", { className: "file", title: image.name }, name);
  return made("a", { className: "file", href: `original/${image.position}`, target: "_blank", "aria-label": `${name}, the original`, title: image.name }, name);
}

function imageItem(image, withClass) {
  const frame = made("a", { className: "frame", href: link("search", { at: image.position }), "aria-label": `Search with ${image.name}`, title: image.name }, thumbnail(image));
  const parts = [frame];
  if (withClass) parts.push(className(image), ...badge(image));
  parts.push(fileName(image));
  if (image.score !== undefined) parts.push(score(image.score));
  return made("li", {}, ...parts);
}

function pager(place, page, pages, to) {
  const step = (text, target) => made("button", { type: "button", disabled: target < 1 || target > pages, onclick: () => { location.hash = to(target); } }, text);
  place.replaceChildren(...(pages > 1 ? [step("Previous", page - 1), made("span", {}, `${page.toLocaleString("en")} of ${pages.toLocaleString("en")}`), step("Next", page + 1)] : []));
}

// ---- search

function showQuery(source, ...name) {
  const place = at("query");
  place.hidden = !source;
  at("search-drop").classList.toggle("filled", Boolean(source));
  if (!source) return place.replaceChildren();
  const image = made("img", { src: source, alt: "The image searched with" });
  image.onerror = () => image.remove();  // a kind that the server reads and the browser does not
  image.onload = () => { if (source.startsWith("blob:")) URL.revokeObjectURL(source); };
  place.replaceChildren(image, made("span", {}, ...name));
}

function showIdentity(identity, copy = null) {
  const place = at("identity");
  place.hidden = !identity && !copy;
  place.classList.toggle("unknown", !copy && identity?.label === null);
  place.classList.toggle("unsure", !copy && identity?.threshold === null);
  if (copy) return place.replaceChildren(made("p", { className: "kind" }, "Already in the index"), made("span", { className: "who" }, className(copy)), fileName(copy));
  if (!identity) return;
  const known = identity.label !== null;
  const { threshold } = identity;
  const title = threshold === null ? "Nearest class" : known ? "Looks like" : threshold > 1 ? "No class can be named" : "No class is near enough";
  const name = known ? made("a", { className: "who", href: link("class", { name: identity.label }) }, identity.label) : made("span", { className: "who" }, "Unknown");
  const nearest = known ? [] : [made("p", { className: "note" }, "The nearest is ", named(identity.nearest), ".")];
  let why = "No threshold is known, so an image of no class gets a name, too: fedss identify says why, --threshold sets one.";
  if (threshold !== null) why = threshold > 1 ? `${about.threshold_note}.` : `A class is named from ${threshold.toFixed(3)} on${about.threshold_note && `: ${about.threshold_note}`}.`;
  const sure = made("details", {}, made("summary", {}, "How sure is this?"), made("p", { className: "note" }, why));
  place.replaceChildren(made("p", { className: "kind" }, title), name, score(identity.score, threshold > 1 ? null : threshold), ...nearest, sure);
}

function showFound(title, note, images) {
  at("found").textContent = title;
  at("found-note").textContent = note;
  at("neighbours").replaceChildren(...images.map((image) => imageItem(image, true)));
}

async function startView(signal) {
  showQuery(null);
  showIdentity(null);
  at("amount").hidden = true;
  const { pictures: images } = await ask("sample", { signal });
  showFound(images.length ? "Or start from one of these" : "Nothing to find", images.length ? "" : "This index holds no images.", images);
}

async function searchView(values, signal) {
  const position = values.get("at");
  const count = at("count").value;
  if (position === null && asked === null) return startView(signal);
  // Only what was answered is shown: a file that is refused leaves the page as it is.
  let answer;
  if (position !== null) {
    answer = await ask(`neighbours/${encodeURIComponent(position)}?count=${count}`, { signal });
    const { query } = answer;
    showQuery(`thumbnail/${query.position}`, ...(query.label === null ? [] : [query.label, made("br")]), fileName(query));
  } else {
    const file = asked, body = new FormData();
    body.append("picture", file);
    answer = await ask(`search?count=${count}`, { method: "POST", body, signal });
    answered = file;
    showQuery(URL.createObjectURL(file), file.name);
  }
  at("amount").hidden = false;
  showIdentity(answer.identity, answer.copy);
  showFound("Nearest images", `Of ${many(about.pictures, "image")}, with the cosine of their embeddings. Click one to search with it, its file name to see the original.`, answer.neighbours);
}

function tooLarge(files) {
  const large = files.find((file) => file.size > about.limit_bytes);
  return large && `${large.name} has ${(large.size / 1e6).toFixed(1)} MB; this server takes images of up to ${(about.limit_bytes / 1e6).toLocaleString("en")} MB.`;
}

function searchWith(files) {
  if (!files.length) return;
  attempt(async () => {
    const fault = files.length > 1 ? `Search with one image at a time, not ${files.length}.` : tooLarge(files);
    if (fault) throw new Error(fault);
    asked = files[0];
    if (location.hash === link("search")) render();
    else location.hash = link("search");
  });
}

// ---- classes

async function classesView(values, signal) {
  const contains = values.get("contains") || "";
  const page = Number(values.get("page")) || 1;
  if (document.activeElement !== at("contains")) at("contains").value = contains;
  const found = await ask(`classes?${new URLSearchParams({ contains, page })}`, { signal });
  const matching = many(found.matching, "class", "classes");
  at("classes-note").replaceChildren(...(contains ? [`${matching} of ${found.total.toLocaleString("en")} with “`, named(contains), "” in the name"] : [matching, about.unlabelled ? `, and ${many(about.unlabelled, "image")} without a class` : ""]));
  at("classes").replaceChildren(...found.classes.map((item) => {
    const href = link("class", { name: item.name });
    return made("li", {}, made("a", { className: "frame", href, "aria-hidden": "true", tabIndex: -1 }, thumbnail(item)), made("a", { className: "name", href, title: item.name }, item.name), ...badge(item), made("span", { className: "of" }, many(item.count, "image")));
  }));
  pager(at("classes-pager"), found.page, found.pages, (to) => link("classes", { contains, page: to }));
}

async function classView(values, signal) {
  const name = values.get("name") || "";
  const page = Number(values.get("page")) || 1;
  at("class-title").textContent = name;
  const found = await ask(`pictures?${new URLSearchParams({ class: name, page })}`, { signal });
  at("class-note").textContent = `${many(found.count, "image")}${found.enrolled ? ", enrolled here" : ""}. Click one to search with it.`;
  at("images").replaceChildren(...found.pictures.map((image) => imageItem(image, false)));
  pager(at("images-pager"), found.page, found.pages, (to) => link("class", { name, page: to }));
}

// ---- enrol

function choose(files) {
  show(chosen.length + files.length > about.most_pictures ? `A class is enrolled from at most ${about.most_pictures} images.` : tooLarge(files));
  chosen = [...chosen, ...files.filter((file) => file.size <= about.limit_bytes)].slice(0, about.most_pictures);
  at("enrolled-note").hidden = true;
  showChosen();
}

function showChosen() {
  at("chosen").replaceChildren(...chosen.map((file, number) => {
    const source = URL.createObjectURL(file);
    const image = made("img", { src: source, alt: file.name, title: file.name });
    image.onload = () => URL.revokeObjectURL(source);
    const drop = () => { chosen = chosen.filter((other) => other !== file); showChosen(); };
    return made("li", {}, image, made("button", { type: "button", onclick: drop, "aria-label": `Leave out image ${number + 1}, ${file.name}` }, "×"));
  }));
  mayEnrol();
}

function mayEnrol() {
  at("enrol-button").disabled = !chosen.length || !at("name").value.trim();
  at("enrol-button").textContent = chosen.length ? `Enrol from ${many(chosen.length, "image")}` : "Enrol";
}

async function enrol() {
  const body = new FormData();
  body.append("name", at("name").value);
  for (const file of chosen) body.append("picture", file);
  at("enrol-button").disabled = true;
  try {
    const done = await ask("enrol", { method: "POST", body });
    const find = made("button", { type: "button", onclick: () => { location.hash = link("search", { at: done.position }); } }, "Find it");
    at("enrolled-note").replaceChildren(named(done.name), ` is enrolled from ${many(done.count, "image")}. Search with another image of it, or:`, find);
    at("enrolled-note").hidden = false;
    chosen = [];
    at("name").value = "";
    showChosen();
  } finally {
    mayEnrol();
  }
  await refresh();
}

async function enrolView(values, signal) {
  at("enrol-help").textContent = `Up to ${about.most_pictures} images of up to ${(about.limit_bytes / 1e6).toLocaleString("en")} MB.`;
  mayEnrol();
  const { classes } = await ask("enrolled", { signal });
  at("none-enrolled").hidden = classes.length > 0;
  at("enrolled").replaceChildren(...classes.map(enrolledItem));
}

function enrolledItem(item) {
  const remove = async () => {
    await ask(`enrolled?${new URLSearchParams({ name: item.name })}`, { method: "DELETE" });
    at("enrolled-note").hidden = true;
    await refresh();
    at("enrolled-title").scrollIntoView({ block: "nearest" });
  };
  const actions = made("span");
  const second = (text, onclick, kind = "") => made("button", { type: "button", className: `second ${kind}`, "aria-label": `${text} ${item.name}`, onclick }, text);
  const offer = () => actions.replaceChildren(second("Remove", () => {
    const sure = second("Remove for good", () => attempt(remove), "danger");
    actions.replaceChildren(sure, " ", second("Keep", offer));
    sure.focus();
  }));
  offer();
  return made("li", {}, thumbnail(item), made("span", { className: "who" }, made("a", { href: link("class", { name: item.name }) }, item.name), made("span", { className: "of" }, many(item.count, "image"))), actions);
}

// ---- the page

async function describe() {
  about = await ask("about");
  at("about").textContent = `fedss search · ${about.title}`;
  at("title").textContent = `${many(about.pictures, "image")} of ${many(about.classes, "class", "classes")}`;
  document.title = `${about.title} – fedss search`;
  at("name").maxLength = about.longest_name;
}

async function refresh() {
  await describe();
  await render();
}

async function render() {
  const [word, query] = location.hash.slice(1).split(/\?(.*)/s);
  const view = views.includes(word) ? word : "search";
  latest.abort();
  latest = new AbortController();
  const { signal } = latest;
  for (const name of views) at(`${name}-view`).hidden = name !== view;
  for (const item of document.querySelectorAll("nav a")) {
    const here = item.hash === `#${view === "class" ? "classes" : view}`;
    if (here) item.setAttribute("aria-current", "page");
    else item.removeAttribute("aria-current");
  }
  const grid = { search: "neighbours", classes: "classes", class: "images", enrol: "enrolled" }[view];
  at(grid).setAttribute("aria-busy", "true");
  const file = asked;
  const fill = { search: searchView, classes: classesView, class: classView, enrol: enrolView }[view];
  await attempt(async () => {
    try {
      await fill(new URLSearchParams(query), signal);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (view === "search" && file !== answered) {
        if (asked === file) asked = answered;  // what was refused would be refused again
      } else {
        for (const id of [grid, "classes-note", "classes-pager", "class-note", "images-pager"]) at(id).replaceChildren();
        if (view === "search") {
          at("amount").hidden = true;
          showIdentity(null);
          showFound("No image to search with", "", []);
        }
      }
      throw error;
    } finally {
      if (!signal.aborted) at(grid).removeAttribute("aria-busy");
    }
  });
}

function takesFiles(zone, input, take) {
  input.addEventListener("change", () => { const files = [...input.files]; input.value = ""; take(files); });
  zone.addEventListener("dragover", () => zone.classList.add("over"));
  for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
}

const enrolling = () => !at("enrol-view").hidden;
const take = (files) => (enrolling() ? choose(files) : searchWith(files));

// An image dropped beside the zone is meant for it; the browser would leave the page and open it.
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  if (about && event.dataTransfer.files.length) take([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => {
  if (about && event.clipboardData.files.length) take([...event.clipboardData.files]);
});
takesFiles(at("search-drop"), at("search-file"), searchWith);
takesFiles(at("enrol-drop"), at("enrol-files"), choose);
at("count").addEventListener("change", render);
at("name").addEventListener("input", mayEnrol);
at("enrol-form").addEventListener("submit", (event) => { event.preventDefault(); if (!at("enrol-button").disabled) attempt(enrol); });

let typing = 0;
at("contains").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => location.replace(link("classes", { contains: at("contains").value })), 150);
});
addEventListener("hashchange", () => { at("enrolled-note").hidden = true; scrollTo(0, 0); render(); });
attempt(refresh);
