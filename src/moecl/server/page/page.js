"use strict";

const AUTO = "auto";
const find = (id) => document.getElementById(id);
let key = "";
let run = null;

function make(name, options = {}, ...children) {
  const { className, share, heat, ...rest } = options;
  const node = Object.assign(document.createElement(name), rest);
  if (className) node.className = className;
  if (share !== undefined) node.style.setProperty("--share", share);
  if (heat !== undefined) node.style.setProperty("--heat", heat);
  node.append(...children);
  return node;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const score = (value) => (value === null ? "–" : value.toFixed(3));

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  if (answer.status === 401) {
    find("key-form").hidden = false;
    find("key").focus();
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error.message);
  return found;
}

function fault(error) {
  return make("p", { className: "fault", role: "alert" }, error.message);
}

function bars(shares, best) {
  const list = make("dl", { className: "bars" });
  for (const [name, share] of shares) {
    const strong = name === best ? "best" : "";
    const bar = make("div", { className: "bar", ariaHidden: "true" }, make("i", { share }));
    list.append(
      make("dt", { className: strong }, name), make("dd", {}, bar), make("dd", { className: strong }, percent(share)));
  }
  return list;
}

const ranked = (shares) => Object.entries(shares).sort((one, other) => other[1] - one[1]);

function who(task, version, expert) {
  return make("p", { className: "who" }, `Answered by ${task}, version ${version}, expert `,
    make("code", { title: expert }, expert.slice(0, 12)));
}

function classified(found) {
  const parts = [];
  if (found.label === null) {
    const writes = run.tasks.some((task) => task.name === found.task && task.kind === "generation");
    const none = found.task === null ? "No task is known for this text"
      : `${found.task} ${writes ? "writes texts" : "reads more than one field"}: choose it above`;
    parts.push(make("p", { className: "label" }, none));
  } else {
    parts.push(make("p", { className: "label" }, found.label));
    if (found.decision !== null) {
      const words = found.decision === "review" ? "For a human to review" : "Decided: needs no human";
      parts.push(make("p", {}, words));
    }
    parts.push(who(found.task, found.version, found.expert));
    parts.push(make("h3", {}, "Scores"), bars(ranked(found.scores), found.label));
  }
  if (found.tasks !== null) parts.push(make("h3", {}, "Which task it is"), bars(ranked(found.tasks), found.task));
  const layers = Object.entries(found.gates || {}).map(([layer, share]) => [`layer ${layer}`, share]);
  if (layers.length) {
    parts.push(make("h3", {}, "Weight of the task's own expert by layer"), bars(layers),
      make("p", { className: "note" }, "Mean over the tokens of the text. The shared expert counts whole beside it, or by the rest where nested is false."));
  }
  return parts;
}

function written(found) {
  const [, name, version, expert] = found.system_fingerprint.match(/^(.*)-v(\d+)-([0-9a-f]+)$/);
  const text = found.choices[0].text ?? found.choices[0].message.content;
  return [make("p", { className: "label" }, text || "(an empty text)"), who(name, version, expert),
    make("p", { className: "note" }, `${found.usage.completion_tokens} tokens`)];
}

function chosen() {
  return run.tasks.find((task) => task.name === find("task").value);
}

function asked(task) {
  const names = task ? task.fields : ["text"];
  const values = names.map((name) => [name, find(`field-${name}`).value]);
  return names.length === 1 ? values[0][1] : Object.fromEntries(values);
}

async function answer(event) {
  event.preventDefault();
  const task = chosen(), model = find("task").value;
  find("go").disabled = true;
  try {
    const parts = task && task.kind === "generation"
      ? written(await (task.chats && find("chat").checked
        ? ask("v1/chat/completions", { model, messages: [{ role: "user", content: asked(task) }] })
        : ask("v1/completions", { model, prompt: [asked(task)] })))
      : classified((await ask("v1/classify", { model, input: [asked(task)], gates: true })).data[0]);
    find("answer").replaceChildren(...parts);
  } catch (error) {
    find("answer").replaceChildren(fault(error));
  } finally {
    find("go").disabled = false;
  }
}

function showFields() {
  const task = chosen();
  const names = task ? task.fields : ["text"];
  const nodes = names.flatMap((name) => [
    make("label", { htmlFor: `field-${name}` }, name === "text" ? "Text" : name),
    make("textarea", { id: `field-${name}`, required: true }),
  ]);
  find("as-chat").hidden = !(task && task.chats);
  find("fields").replaceChildren(...nodes);
}

function head(...names) {
  const cells = names.map((name) => make("th", { scope: "col" }, name));
  return make("thead", {}, make("tr", {}, ...cells));
}

function showTasks() {
  const body = make("tbody");
  for (const task of run.tasks) {
    const answers = task.kind === "generation" ? "writes a text" : task.labels.join(", ");
    const versions = task.versions.length > 1 ? `${task.version} of ${task.versions.join(", ")}` : `${task.version}`;
    body.append(make("tr", {}, make("th", { scope: "row" }, task.name), make("td", { className: "words" }, answers),
      make("td", {}, task.metric), make("td", {}, score(task.score)), make("td", {}, versions),
      make("td", {}, make("code", { title: task.expert }, task.expert.slice(0, 12)))));
  }
  const top = head("task", "labels", "metric", "score", "version", "expert");
  top.querySelectorAll("th")[1].className = "words";
  find("tasks").replaceChildren(top, body);
}

function showR() {
  find("r-section").hidden = run.R === null;
  if (run.R === null) return;
  const body = make("tbody");
  run.R.forEach((row, moment) => {
    const cells = row.map((value, place) => {
      if (value === null) return make("td", { className: "empty" }, "–");
      const learned = place === moment - 1 ? " learned" : "";
      return make("td", { className: `heat${learned}`, heat: value }, score(value));
    });
    const name = moment ? `after ${run.R_tasks[moment - 1]}` : "before any";
    body.append(make("tr", {}, make("th", { scope: "row" }, name), ...cells));
  });
  find("r").replaceChildren(head("", ...run.R_tasks), body);
  const told = Object.entries(run.metrics).filter(([, value]) => value !== null);
  find("metrics").textContent = told.map(([name, value]) => `${name.replace(/^[bf]wt$/, (word) => word.toUpperCase()).replaceAll("_", " ")} ${score(value)}`).join(" · ");
}

function showRun() {
  const count = run.tasks.length === 1 ? "one task" : `${run.tasks.length} tasks`;
  find("base").textContent = `${count} on ${run.base}, each with its own expert.`;
  const names = [...(run.auto ? [AUTO] : []), ...run.tasks.map((task) => task.name)];
  const options = names.map((name) => make("option", { value: name }, name === AUTO ? "auto: find the task" : name));
  find("task").replaceChildren(...options);
  showFields();
  showTasks();
  showR();
}

async function start() {
  try {
    run = await ask("v1/run");
    find("key-form").hidden = true;
    showRun();
    find("loaded").hidden = false;
    find("fault").replaceChildren();
    find("task").focus();
  } catch (error) {
    find("base").textContent = "";
    find("fault").replaceChildren(fault(error));
  }
}

find("form").addEventListener("submit", answer);
find("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("form").requestSubmit();
});
find("task").addEventListener("change", showFields);
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value;
  start();
});
start();
