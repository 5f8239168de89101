/**
 * The chat in a browser, in two parts: `Client` is the connection and knows no page; `Page` draws and knows no socket.
 * Both speak of protocol objects as docs/protocol.md has them.
 */

const SUBPROTOCOL = "tricorn.v1";
const FINAL_CODE = 4500; // close codes from here on say: do not come back unchanged
const FIRST_HEARTBEAT = 10; // seconds, for as long as `welcome` has not named the server's own
const FIRST_BACKOFF = 1; // seconds; doubles with each attempt
const LONGEST_BACKOFF = 15;
const ID = /^[A-Za-z0-9._:~-]{1,128}$/;

/** A new id for a post or a conversation. Not `crypto.randomUUID`, which pages without TLS do not have. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * One conversation, kept up over as many WebSockets as it takes. Every event of its log arrives once and in order, and
 * what was posted is repeated until the log has it or the server refuses it. Tells of:
 *
 * - `state`: `{state, reason}`, where `state` is connected, reconnecting or closed (for good);
 * - `event`: an event of the conversation;
 * - `reset`: forget what was told of this conversation: the log has lost its past (`reason` is lost), or does not keep
 *   what lies before the next event (trimmed);
 * - `refused`: an `error` of the protocol that nothing can be done about; its `ref` may be the id of a post or question.
 *
 * `token`, where the server wants one, is a function that returns it: asked for each connection, so that a connection
 * that ended with its token comes back with the next.
 */
export class Client extends EventTarget {
  #url;
  #conversation;
  #token;
  #socket = null;
  #openedAt = null; // when the server attached this socket to the conversation; null: not yet
  #epoch; // with #seq: how far in which log we are
  #seq = 0;
  #posts = new Map(); // id → text, of what the log is not known to have, in order
  #answers = new Map(); // question → text, of those that the log is not known to have
  #held = null; // until it fires nothing is posted: what the server refused for now comes first
  #heartbeat = FIRST_HEARTBEAT;
  #textCharacters = Infinity;
  #watchdog;
  #retry = null;
  #attempts = 0;
  #retryAfter = 0;
  #reason = "";

  constructor(url, conversation, token = () => null) {
    super();
    this.#url = url;
    this.#conversation = conversation;
    this.#token = token;
  }

  /** Connect now: for the first time, or without waiting for the next attempt. Does nothing in any other state. */
  connect() {
    if (this.#socket || (this.#attempts > 0 && this.#retry === null)) return;
    clearTimeout(this.#retry);
    this.#retry = null;
    this.#attempts += 1;
    const token = this.#token();
    const socket = new WebSocket(this.#url, token ? [SUBPROTOCOL, `bearer.${token}`] : SUBPROTOCOL);
    socket.onopen = () =>
      this.#send({ type: "open", conversation: this.#conversation, after: this.#seq, epoch: this.#epoch });
    socket.onmessage = ({ data }) => {
      this.#watch();
      this.#receive(JSON.parse(data));
    };
    socket.onclose = ({ code, reason }) => this.#lost(code, reason);
    this.#socket = socket;
    this.#watch();
  }

  /** Say `text`, now or when the connection is back. `id` names the post; the same id is never said twice. */
  post(id, text) {
    this.#posts.set(id, text);
    if (this.#openedAt !== null && this.#held === null) this.#deliver(id, text);
  }

  /** Answer the question `ask`, now or when the connection is back. */
  answer(ask, text) {
    this.#answers.set(ask, text);
    if (this.#openedAt !== null) this.#reply(ask, text);
  }

  /** End a run early. Without a connection this does nothing. */
  cancel(run) {
    if (this.#openedAt !== null) this.#send({ type: "cancel", conversation: this.#conversation, run });
  }

  #receive(message) {
    switch (message.type) {
      case "welcome":
        this.#heartbeat = message.heartbeat;
        this.#textCharacters = message.limits.text_characters;
        break;
      case "opened":
        this.#attach(message);
        break;
      case "posted":
        this.#posts.delete(message.id);
        break;
      case "error":
        this.#refuse(message);
        break;
      case "closing":
        this.#reason = message.reason;
        this.#retryAfter = message.retry_after;
        break;
      default:
        // What has no `seq` is no event; what has an old one has been here before.
        if (message.seq > this.#seq) this.#advance(message);
    }
  }

  #attach({ epoch, first = 1 }) {
    if (this.#epoch !== undefined && this.#epoch !== epoch) this.#forget("lost");
    if (this.#seq + 1 < first) this.#forget("trimmed", first - 1);
    this.#epoch = epoch;
    this.#openedAt = performance.now();
    this.#tell("state", { state: "connected", reason: "" });
    this.#deliverAll();
  }

  #forget(reason, seq = 0) {
    this.#seq = seq;
    this.#epoch = undefined;
    this.#tell("reset", { reason });
  }

  #refuse(error) {
    if (this.#openedAt === null) {
      // About `open`, on which all else depends. Not found: the log ends before the last event that we saw.
      if (error.code === "not_found") this.#forget("lost");
      this.#reason = error.message;
      this.#socket.close();
    } else if (error.retry_after !== undefined || error.code === "unavailable") {
      this.#hold(error.retry_after ?? FIRST_BACKOFF);
    } else if (error.code !== "closing" && error.code !== "not_found") {
      this.#posts.delete(error.ref);
      this.#answers.delete(error.ref);
      this.#tell("refused", error);
    } else if (error.code === "not_found") {
      this.#answers.delete(error.ref); // somebody else was faster: an event says so
    } // else: a post that is kept for the next connection, or a run that ended before it was cancelled
  }

  /** Post again, in order, what the server has refused for now. */
  #hold(seconds) {
    clearTimeout(this.#held);
    this.#held = setTimeout(() => this.#deliverAll(), 1000 * (seconds + Math.random()));
  }

  #deliverAll() {
    clearTimeout(this.#held);
    this.#held = null;
    this.#posts.forEach((text, id) => this.#deliver(id, text));
    this.#answers.forEach((text, ask) => this.#reply(ask, text));
  }

  #advance(event) {
    this.#seq = event.seq;
    if (event.type === "user_message") this.#posts.delete(event.id);
    if (event.type === "agent_asked") this.#answers.delete(event.ask);
    this.#tell("event", event);
  }

  #deliver(id, text) {
    if (this.#fits(id, text)) this.#send({ type: "post", id, conversation: this.#conversation, text });
  }

  #reply(ask, text) {
    if (this.#fits(ask, text)) this.#send({ type: "answer", conversation: this.#conversation, ask, text });
  }

  /** Checked here because past another limit the server would close, and every new connection would repeat it. */
  #fits(ref, text) {
    const characters = Array.from(text).length; // code points, as the server counts
    if (characters <= this.#textCharacters) return true;
    const message = `${characters} characters are too many: ${this.#textCharacters} at most`;
    this.#refuse({ code: "too_long", message, ref });
    return false;
  }

  #send(message) {
    this.#socket.send(JSON.stringify(message));
  }

  /** The server is never silent for longer than a heartbeat. A dead network closes nothing: only silence tells. */
  #watch() {
    clearTimeout(this.#watchdog);
    this.#watchdog = setTimeout(() => {
      const socket = this.#socket;
      socket.onopen = socket.onmessage = socket.onclose = null; // its end may take the browser minutes: do not wait
      socket.close();
      this.#lost(1006, "no answer");
    }, 2000 * this.#heartbeat);
  }

  #lost(code, reason) {
    clearTimeout(this.#watchdog);
    this.#socket = null;
    // Only a connection that lasted proves that the next may come at once.
    if (this.#openedAt !== null && performance.now() - this.#openedAt > 1000 * LONGEST_BACKOFF) this.#attempts = 1;
    this.#openedAt = null;
    clearTimeout(this.#held); // the next connection begins with all posts
    reason = this.#reason || reason;
    if (code >= FINAL_CODE) {
      this.#tell("state", { state: "closed", reason: reason || `code ${code}` });
      return;
    }
    const backoff = Math.min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (this.#attempts - 1));
    // Anywhere in the backoff, so that a thousand clients of one server do not come back as one.
    this.#retry = setTimeout(() => this.connect(), 1000 * (this.#retryAfter + backoff * Math.random()));
    this.#retryAfter = 0;
    this.#reason = "";
    this.#tell("state", { state: "reconnecting", reason });
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

const STATES = { connected: "Connected", reconnecting: "Reconnecting…", closed: "Closed" };
const RESETS = {
  lost: "The server has lost what was said here before.",
  trimmed: "The server does not keep what was said here earlier.",
};
const OUTCOMES = {
  failed: "The agent failed",
  cancelled: "Stopped",
  abandoned: "Stopped, because nobody was here",
  timeout: "The agent ran out of time",
  interrupted: "The server stopped before the agent was done",
};

const UNANSWERED = { timeout: "No answer in time", cancelled: "No longer asked", interrupted: "No longer asked" };

/** An element. Children that are strings become text, never markup. */
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

/** An argument or a result: an object as a list of names and values, a text as it is, anything else as JSON. */
function shown(value) {
  if (typeof value === "string") return value;
  if (value === null || typeof value !== "object" || Array.isArray(value)) return JSON.stringify(value);
  const pairs = Object.entries(value).map(([name, inner]) => {
    const text = typeof inner === "string" ? inner : JSON.stringify(inner);
    return element("div", "", element("dt", "", name), element("dd", "", text));
  });
  return element("dl", "", ...pairs);
}

const duration = (seconds) => (seconds < 1 ? `${Math.ceil(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`);

/** The page of chat.html, drawn from what a `Client` tells, and what a person does in it. */
class Page {
  #client;
  #at = (id) => document.getElementById(id);
  #log = this.#at("log");
  #text = this.#at("text");
  #stop = this.#at("stop");
  #messages = new Map(); // post id → its element
  #unsent = new Set(); // those of them that are not in the log
  #runs = new Map(); // of the runs in progress: run → {item, calls: call → element}
  #asks = new Map(); // questions that wait: ask → element

  constructor(client) {
    this.#client = client;
    client.addEventListener("state", ({ detail }) => this.#state(detail));
    client.addEventListener("event", ({ detail }) => this.#draw[detail.type]?.(detail));
    client.addEventListener("reset", ({ detail }) => this.#reset(detail));
    client.addEventListener("refused", ({ detail }) => this.#refused(detail));
    this.#listen();
    this.#follow(this.#at("scroller"), this.#at("column"));
  }

  #draw = {
    __proto__: null,
    user_message: ({ id, text }) => {
      const item = this.#messages.get(id) ?? this.#message(id, text);
      this.#unsent.delete(item);
      item.dataset.state = "sent";
      item.querySelector(".note")?.remove();
      this.#log.append(item); // it may have waited further up
    },
    agent_started: ({ run, agent, post, parent }) => this.#begin(run, agent, this.#messages.get(post), parent),
    agent_thinking: ({ run, text }) => {
      this.#run(run).item.append(element("p", "thinking", text));
    },
    tool_executing: ({ run, call, tool, arguments: given }) => {
      const { item, calls } = this.#run(run);
      const status = element("span", "status", "running");
      const card = element("section", "tool", element("h4", "", tool), status, element("div", "data", shown(given)));
      card.dataset.state = "running";
      item.append(card);
      calls.set(call, card);
    },
    tool_completed: ({ run, call, result, error, seconds }) => {
      const card = this.#run(run).calls.get(call);
      if (!card) return; // it began before what the log keeps
      card.dataset.state = error === undefined ? "done" : "failed";
      card.querySelector(".status").textContent = `${card.dataset.state} · ${duration(seconds)}`;
      const outcome = error ?? result ?? null;
      if (outcome !== null) card.append(element("div", "data result", shown(outcome)));
    },
    agent_asking: ({ run, ask, text, choices }) => {
      const form = choices ? this.#choices(ask, choices) : this.#entry(ask, text);
      const card = element("section", "ask", element("p", "question", text), form);
      card.dataset.state = "waiting";
      this.#run(run).item.append(card);
      this.#setBusy(run, "false"); // a screen reader reads it now
      this.#asks.set(ask, card);
    },
    agent_asked: ({ run, ask, outcome, answer }) => {
      this.#setBusy(run, "true");
      const card = this.#asks.get(ask);
      if (!card) return; // it was asked before what the log keeps
      card.dataset.state = outcome;
      card.replaceChildren(card.firstElementChild, element("p", "reply", answer ?? UNANSWERED[outcome] ?? outcome));
      this.#asks.delete(ask);
    },
    agent_message: ({ run, text }) => {
      const { item } = this.#run(run);
      const last = item.lastElementChild;
      if (last.className === "answer") last.append(text);
      else item.append(element("p", "answer", text));
    },
    agent_completed: ({ run, outcome, error, error_id, seconds }) => {
      const { item } = this.#run(run);
      item.ariaBusy = "false";
      if (outcome !== "success") {
        const reference = error_id === undefined ? "" : ` · error ${error_id}`;
        const reason = error === undefined ? "" : `: ${error}`;
        const text = `${OUTCOMES[outcome] ?? outcome}${reason} · ${duration(seconds)}${reference}`;
        item.append(element("p", outcome === "cancelled" ? "outcome" : "outcome bad", text));
      }
      this.#runs.delete(run);
      this.#stop.hidden = this.#runs.size === 0;
    },
  };

  #begin(run, agent, message, parent) {
    const item = element(parent ? "section" : "li", parent ? "run child" : "run", element("h3", "", agent));
    item.ariaBusy = "true"; // a screen reader waits for the end instead of reading piece by piece
    if (parent) this.#run(parent).item.append(item);
    else if (message) message.after(item);
    else this.#log.append(item);
    this.#runs.set(run, { item, calls: new Map(), parent });
    this.#stop.hidden = false;
  }

  /** Say of a run, and of those that it is part of, whether a screen reader should wait. */
  #setBusy(run, busy) {
    const { item, parent } = this.#run(run);
    item.ariaBusy = busy;
    if (parent) this.#setBusy(parent, busy);
  }

  /** A run in progress; where it began before what the log keeps, nobody knows of which agent. */
  #run(run) {
    if (!this.#runs.has(run)) this.#begin(run, "Agent");
    return this.#runs.get(run);
  }

  #choices(ask, choices) {
    const buttons = choices.map((choice) => {
      const button = element("button", "", choice);
      button.type = "button";
      button.addEventListener("click", () => this.#answer(ask, choice));
      return button;
    });
    return element("div", "choices", ...buttons);
  }

  #entry(ask, question) {
    const field = element("input", "");
    field.ariaLabel = question;
    const form = element("form", "choices", field, element("button", "", "Answer"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text) this.#answer(ask, text);
    });
    return form;
  }

  #answer(ask, text) {
    const card = this.#asks.get(ask);
    card.querySelector(".note")?.remove();
    card.querySelectorAll("button, input").forEach((each) => (each.disabled = true));
    this.#client.answer(ask, text);
  }

  #message(id, text) {
    const item = element("li", "message", element("h3", "unseen", "You"), element("p", "", text));
    this.#messages.set(id, item);
    this.#log.append(item);
    return item;
  }

  #state({ state, reason }) {
    const place = this.#at("state");
    place.dataset.state = state;
    place.textContent = reason ? `${STATES[state]} (${reason})` : STATES[state];
    this.#stop.disabled = state !== "connected";
  }

  #reset({ reason }) {
    const note = element("p", "note", RESETS[reason]);
    this.#log.replaceChildren(element("li", "", note), ...this.#unsent);
    this.#runs.clear();
    this.#asks.clear();
    this.#messages.forEach((item, id) => this.#unsent.has(item) || this.#messages.delete(id));
    this.#stop.hidden = true;
  }

  #refused({ message, ref, error_id }) {
    const note = element("p", "note", error_id === undefined ? message : `${message} · error ${error_id}`);
    const item = this.#messages.get(ref);
    const card = this.#asks.get(ref);
    if (card) {
      card.querySelectorAll("button, input").forEach((each) => (each.disabled = false));
      card.append(note);
    } else if (item) {
      item.dataset.state = "refused";
      item.append(note);
    } else {
      this.#log.append(element("li", "", note));
    }
  }

  #say(text) {
    const id = newId();
    const item = this.#message(id, text);
    item.dataset.state = "sending";
    this.#unsent.add(item);
    item.scrollIntoView({ block: "end" });
    this.#client.post(id, text);
  }

  #listen() {
    const stop = () => this.#runs.forEach(({ parent }, run) => parent || this.#client.cancel(run));
    this.#stop.addEventListener("click", stop);
    document.addEventListener("keydown", ({ key }) => key === "Escape" && stop());
    this.#at("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.#text.value.trim();
      if (text) this.#say(text);
      this.#text.value = "";
      this.#text.focus();
    });
    this.#text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#at("composer").requestSubmit();
    });
    this.#at("empty").addEventListener("click", ({ target }) => {
      if (target.type !== "button") return;
      this.#text.value = target.textContent.replace("…", "");
      this.#text.focus();
    });
  }

  /** Keep the end in view while more comes, unless the person has scrolled up to read. */
  #follow(scroller, column) {
    let top = 0;
    let following = true;
    scroller.addEventListener("scroll", () => {
      const below = scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop;
      following = below < 32 || (following && scroller.scrollTop >= top); // more may have come since we scrolled
      top = scroller.scrollTop;
    });
    const observer = new ResizeObserver(() => following && scroller.scrollTo(0, scroller.scrollHeight));
    observer.observe(column);
    observer.observe(scroller);
  }
}

/** The conversation that the address names, so that a reload or a bookmark comes back to it; else a new one. */
function conversationOf(location) {
  const named = location.hash.slice(1);
  if (ID.test(named)) return named;
  const made = newId();
  history.replaceState(null, "", `#${made}`);
  return made;
}

// Where there is no such page, this module is a library.
if (globalThis.document?.getElementById("log")) {
  // Whoever logs people in on this origin leaves their token here; it ends with the tab.
  const token = () => sessionStorage.getItem("tricorn.token");
  const client = new Client(new URL("ws", location).href.replace("http", "ws"), conversationOf(location), token);
  new Page(client);
  client.connect();
  addEventListener("online", () => client.connect());
  addEventListener("hashchange", () => location.reload());
}
