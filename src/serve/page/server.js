// Talking to the server. Keys live in this module's memory and go out in the Authorization header
// alone.

export const keys = { api: "", patch: "" };

/** The server's own sentence where there is one. */
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export async function call(path, { key = keys.api || keys.patch, ...options } = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Refused(0, "unreachable", `The server at ${location.host} does not answer.`);
  }
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not this server's own words: the status says enough.
  }
  throw new Refused(response.status, error.code, sentence(error.message ?? `The server answered ${response.status}.`));
}

/** `text` as a sentence of its own. */
export function sentence(text) {
  const t = text.trim();
  return t.charAt(0).toUpperCase() + t.slice(1) + (/[.!?]$/.test(t) ? "" : ".");
}

/** Events of a text/event-stream body, parsed, up to [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, "cut", "The connection was lost before the answer ended.");
    held += value;
    const blocks = held.split(/\r?\n\r?\n/);
    held = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((l) => l.startsWith("data:"));
      const data = lines.map((l) => l.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
