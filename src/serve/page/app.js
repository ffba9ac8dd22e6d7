// The page: a chat, the active patches, the same prompt with and without them, the report.
//
// Everything a server or a model says is put in place as text, never as markup.

import { Refused, call, events, keys, sentence } from "./server.js";

const $ = (id) => document.getElementById(id);
const MAX_TOKENS = 512;
const POLL_MS = 5000;

/** @type {{prompt: string, after: string, before: string}[]} what the model has been told */
let history = [];
let running = null; // the AbortController of the answers being written
let patches = [];
let unpatchedAllowed = false;
let hasReport = null; // not known yet

// ---- what is known of the server

async function refresh() {
  try {
    if (!$("model").textContent) {
      const model = (await (await call("v1/models")).json()).data[0].id;
      $("model").textContent = model;
      document.title = `${model} – nepenthe`;
    }
    const list = await (await call("v1/patches")).json();
    patches = list.data;
    unpatchedAllowed = list.allow_unpatched;
    await findReport();
    state("ok", "Connected");
  } catch (e) {
    if (e.status === 401) state("wait", "Key wanted");
    else state("bad", e.status === 0 ? "Not reachable" : e.message);
    return e;
  } finally {
    showPatches();
    showSwitch();
  }
}

function state(kind, text) {
  $("state").className = kind;
  // A live region: said when it changes, not at every look.
  if ($("state-text").textContent !== text) $("state-text").textContent = text;
}

function showPatches() {
  const items = patches.map((p) => {
    const item = document.createElement("li");
    const name = document.createElement("b");
    name.textContent = p.name;
    const about = document.createElement("span");
    about.className = "soft small";
    const said = [`scale ${p.scale}`, p.method];
    if (p.n_forget) said.push(`${p.n_forget} records forgotten`);
    about.textContent = said.filter(Boolean).join(" · ");
    const id = document.createElement("code");
    id.className = "soft";
    id.textContent = p.id.slice(0, 16);
    item.append(name, about, id);
    return item;
  });
  $("patches").replaceChildren(...items);
  $("no-patches").textContent = $("model").textContent ? "None." : "Not known yet.";
  $("no-patches").hidden = items.length > 0;
  $("panel-label").textContent = panelIsOpen() ? "Back to the chat" : `Patches: ${items.length}`;
}

function showSwitch() {
  const both = $("both");
  const note = $("both-note");
  const why = !unpatchedAllowed && $("state").className === "ok"
    ? "Before and after wants a server started with --allow-unpatched and --patch-key."
    : both.checked && patches.length === 0
      ? "No patch is active: both answers come from the same model."
      : "";
  both.disabled = !unpatchedAllowed;
  note.textContent = why;
  note.hidden = !why;
}

async function findReport() {
  if (hasReport === null) {
    try {
      hasReport = Boolean(await call("report", { method: "HEAD" }));
    } catch (e) {
      if (e.status !== 404) throw e;
      hasReport = false;
    }
  }
  $("evidence").hidden = !hasReport;
  // A link carries no key.
  $("report-link").hidden = Boolean(keys.api || keys.patch);
}

// ---- one prompt

function element(tag, className, text = "") {
  const e = document.createElement(tag);
  e.className = className;
  e.textContent = text;
  return e;
}

/** An answer's place in the page. */
function place(side, title) {
  const box = element("section", `answer ${side}`);
  const text = element("p", "text");
  const note = element("p", "note soft small");
  box.setAttribute("aria-busy", "true");
  box.append(element("h3", "", title), text, note);
  return { box, text, note };
}

function named(header) {
  if (!header || header === "none") return "no patch";
  return header.split(", ").map((one) => {
    const [id, scale] = one.split(";scale=");
    const known = patches.find((p) => p.id.startsWith(id));
    return `${known ? known.name : id}${scale === "1" ? "" : ` at scale ${scale}`}`;
  }).join(", ");
}

/** Write one answer; `say` gets its text as it comes. Gives the text, whole or stopped. */
async function answer(side, at, messages, signal, say) {
  const body = {
    messages, stream: true, temperature: 0, max_tokens: MAX_TOKENS,
    stream_options: { include_usage: true },
  };
  let key = keys.api || keys.patch;
  if (side === "before") {
    body.patches = "none";
    key = keys.patch;
  }
  let text = "";
  const notes = [];
  const began = performance.now();
  try {
    const response = await call("v1/chat/completions", {
      method: "POST", key, signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    notes.push(named(response.headers.get("nepenthe-patches")));
    for await (const event of events(response)) {
      if (event.error) throw new Refused(0, event.error.code, sentence(event.error.message));
      const choice = event.choices?.[0];
      const piece = choice?.delta?.content;
      if (piece) {
        const follows = atEnd();
        text += piece;
        at.text.append(piece);
        if (follows) toEnd();
        say(piece);
      }
      if (choice?.finish_reason === "length") notes.push("cut at the length limit");
      if (event.usage) {
        const seconds = (performance.now() - began) / 1000;
        notes.push(`${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`);
      }
    }
    if (!text) at.text.append("(an empty answer)");
  } catch (e) {
    if (e.name === "AbortError") notes.push("stopped");
    else {
      at.box.classList.add("failed");
      notes.push(text ? e.message : "no answer");
      throw e;
    }
  } finally {
    at.note.textContent = notes.join(" · ");
    at.box.setAttribute("aria-busy", "false");
  }
  return text;
}

/** Underline the words between the first and the last that differ. */
function markDifference(...places) {
  const words = places.map((p) => p.textContent.split(/(?<=\s)/));
  const [a, b] = words;
  const most = Math.min(a.length, b.length);
  let from = 0;
  while (from < most && a[from] === b[from]) from++;
  let tail = 0;
  while (tail < most - from && a.at(-1 - tail) === b.at(-1 - tail)) tail++;
  places.forEach((p, i) => {
    const [head, other, rest] = [
      words[i].slice(0, from), words[i].slice(from, words[i].length - tail), words[i].slice(words[i].length - tail),
    ].map((part) => part.join(""));
    if (other) p.replaceChildren(head, element("mark", "", other), rest);
  });
}

async function ask(prompt) {
  const both = $("both").checked;
  if (both && !keys.patch) {
    wantKey("patch-key", "The answer without patches wants the patch key.");
    return false;
  }
  fail("");
  $("said").replaceChildren();
  $("empty").hidden = true;
  const turn = element("article", "turn");
  const answers = element("div", both ? "answers two" : "answers");
  const before = both ? place("before", "Without patches") : null;
  const after = place("after", both ? "With the active patches" : "Answer");
  if (before) answers.append(before.box);
  answers.append(after.box);
  turn.append(element("h3", "", "You"), element("p", "text", prompt), answers);
  $("log").append(turn);
  toEnd();

  running = new AbortController();
  busy(true);
  const told = (side) => [
    ...history.flatMap((t) => [
      { role: "user", content: t.prompt },
      { role: "assistant", content: t[side] },
    ]),
    { role: "user", content: prompt },
  ];
  const voice = both ? null : speaker();
  const jobs = [answer("after", after, told("after"), running.signal, (p) => voice?.add(p))];
  if (before) jobs.push(answer("before", before, told("before"), running.signal, () => {}));
  const [a, b] = await Promise.allSettled(jobs);
  voice?.end();
  running = null;
  busy(false);
  if (both) {
    speak(`Without patches: ${before.text.textContent}`);
    speak(`With the active patches: ${after.text.textContent}`);
  }
  const bad = [a, b].find((r) => r?.status === "rejected");
  if (bad) {
    fail(bad.reason.message);
    refresh();
    return false;
  }
  if (both) markDifference(before.text, after.text);
  history.push({ prompt, after: a.value, before: b?.value ?? "" });
  return true;
}

// ---- for ears: whole sentences, not tokens

function speak(text) {
  if (text.trim()) $("said").append(element("p", "", text));
}

function speaker() {
  let held = "";
  return {
    add(piece) {
      held += piece;
      const end = held.search(/[.!?\n](?=\s)(?!.*[.!?\n]\s)/s);
      if (end < 0) return;
      speak(held.slice(0, end + 1));
      held = held.slice(end + 1);
    },
    end: () => speak(held),
  };
}

// ---- the page itself

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("both").disabled = is || !unpatchedAllowed;
  $("clear").disabled = is;
}

function stop() {
  running?.abort();
  $("prompt").focus();
}

function atEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function toEnd() {
  $("log").scrollTop = $("log").scrollHeight;
}

function fit() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function panelIsOpen() {
  return document.body.classList.contains("panel-open");
}

function openPanel(is) {
  document.body.classList.toggle("panel-open", is);
  $("panel-toggle").setAttribute("aria-expanded", String(is));
  showPatches();
}

/** On a narrow screen the panel hides the chat, so both say it. */
function wantKey(field, message) {
  openPanel(true);
  fail(message);
  $("keys-note").textContent = message;
  $(field).focus();
}

function forget(note) {
  history = [];
  const turns = $("log").querySelectorAll(".turn");
  if (note && turns.length) {
    $("log").append(element("p", "divider", note));
    toEnd();
  }
}

async function send() {
  const prompt = $("prompt").value.trim();
  if (!prompt || running) return;
  $("prompt").value = "";
  fit();
  // A prompt that got no answer is kept, to be sent again.
  if (!(await ask(prompt)) && !$("prompt").value) {
    $("prompt").value = prompt;
    fit();
  }
}

$("ask").addEventListener("submit", (e) => {
  e.preventDefault();
  send();
});
$("prompt").addEventListener("input", fit);
$("prompt").addEventListener("keydown", (e) => {
  // Enter also ends the composition of a word in many scripts.
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (e) => {
  if (e.key !== "Escape" || $("report").open) return;
  if (running) stop();
  else if (panelIsOpen()) {
    openPanel(false);
    $("panel-toggle").focus();
  }
});
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", () => {
  forget("");
  fail("");
  $("log").querySelectorAll(".turn, .divider").forEach((e) => e.remove());
  $("said").replaceChildren();
  $("empty").hidden = false;
  $("prompt").focus();
});
$("both").addEventListener("change", () => {
  // Each side remembers its own answers: the conversation begins anew.
  forget($("both").checked ? "new chat, before and after" : "new chat, with the active patches");
  showSwitch();
});
$("panel-toggle").addEventListener("click", () => openPanel(!panelIsOpen()));
$("keys").addEventListener("submit", async (e) => {
  e.preventDefault();
  keys.api = $("api-key").value.trim();
  keys.patch = $("patch-key").value.trim();
  fail("");
  const error = await refresh();
  $("keys-note").textContent = error ? error.message : "In use until this page is closed or loaded again.";
});
$("report-open").addEventListener("click", async () => {
  try {
    $("report-frame").srcdoc = await (await call("report")).text();
    $("report").showModal();
  } catch (e) {
    fail(e.message);
  }
});

const first = await refresh();
if (first?.status === 401) {
  wantKey("api-key", "This server wants an API key.");
} else {
  if (first) fail(first.message);
  $("prompt").focus();
}
setInterval(() => {
  if (!document.hidden && !running) refresh();
}, POLL_MS);
