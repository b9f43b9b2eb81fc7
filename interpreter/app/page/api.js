// Requests to the server. Errors contain the message of the server.

const HEADERS = { "X-Interpreter": "1" };
const TOKEN_KEY = "interpreter-token";
const CLIP_KEY = "interpreter-clip";
export const GONE = "The server no longer has your clip: it was restarted, or this page was disconnected for more than "
  + "10 minutes. Choose the video again.";
const NO_ANSWER = "The server does not answer. Is it still running?";

let base = "";

class ServerError extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ServerError(0, NO_ANSWER);
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new ServerError(response.status, answer.error ?? `The server answered ${response.status}.`);
}

const json = async (path, options) => (await request(path, options)).json();

/** Find the session of this tab again, or open a new one. @returns {Promise<{session: any, gone: boolean}>} */
export async function openSession() {
  const token = sessionStorage.getItem(TOKEN_KEY);
  let session = null;
  let gone = false;
  if (token) {
    try {
      session = await json(`/api/s/${encodeURIComponent(token)}`);
    } catch (error) {
      if (error.status !== 404) throw error;
      gone = sessionStorage.getItem(CLIP_KEY) !== null;
    }
  }
  session ??= await json("/api/sessions", { method: "POST", headers: HEADERS });
  sessionStorage.setItem(TOKEN_KEY, session.token);
  base = `/api/s/${encodeURIComponent(session.token)}`;
  return { session, gone };
}

/** Remember whether this tab has a clip: only then, a lost session needs a message. */
export function rememberClip(has) {
  if (has) sessionStorage.setItem(CLIP_KEY, "1");
  else sessionStorage.removeItem(CLIP_KEY);
}

/**
 * Follow the state.
 * @param {{onState: (state: any) => void, onLost: () => void, onClosed: () => void}} handlers onLost: the browser
 *   tries again; onClosed: it does not
 */
export function listen({ onState, onLost, onClosed }) {
  const source = new EventSource(`${base}/events`);
  source.onmessage = (event) => onState(JSON.parse(event.data));
  source.onerror = () => {
    if (source.readyState !== EventSource.CLOSED) return onLost();
    source.close();
    return onClosed();
  };
}

/** @param {"segment"|"compare"|"cancel"|"edit"|"download"} action */
export async function post(action, body = {}) {
  const headers = { ...HEADERS, "Content-Type": "application/json" };
  const response = await request(`${base}/${action}`, { method: "POST", headers, body: JSON.stringify(body) });
  return response.json().catch(() => ({}));
}

export const removeClip = () => request(`${base}/clip`, { method: "DELETE", headers: HEADERS });

/**
 * Send a file. Uses XMLHttpRequest, because fetch reports no progress of uploads.
 * @param {File} file
 * @param {(percent: number) => void} onProgress
 * @returns {{done: Promise<any>, abort: () => void}} done: the clip, or null after abort
 */
export function upload(file, onProgress) {
  const sending = new XMLHttpRequest();
  const done = new Promise((resolve, reject) => {
    sending.upload.onprogress = ({ loaded, total }) => onProgress(total ? Math.floor((100 * loaded) / total) : 0);
    sending.onload = () => {
      let answer = {};
      try {
        answer = JSON.parse(sending.responseText);
      } catch {
        // Not JSON: the message below contains the status.
      }
      if (sending.status < 300) resolve(answer.clip);
      else reject(new ServerError(sending.status, answer.error ?? `The server answered ${sending.status}.`));
    };
    sending.onerror = () => reject(new ServerError(0, NO_ANSWER));
    sending.onabort = () => resolve(null);
    sending.open("PUT", `${base}/clip?name=${encodeURIComponent(file.name)}`);
    sending.setRequestHeader("X-Interpreter", "1");
    sending.send(file);
  });
  return { done, abort: () => sending.abort() };
}

export async function frame(clip, number) {
  return (await request(`${base}/frames/${number}?clip=${encodeURIComponent(clip)}`)).blob();
}

export async function labels(pane, version, number) {
  const response = await request(`${base}/labels/${pane}/${number}?version=${encodeURIComponent(version)}`);
  return new Uint8Array(await response.arrayBuffer());
}

export const downloadUrl = (format) => `${base}/download/${format}`;

export const runs = () => json("/api/runs");

export const training = (run) => json(`/api/runs/${encodeURIComponent(run)}/training`);
