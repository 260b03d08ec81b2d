// Shows the numbers of the page's data for what is chosen. The choice is in the address (#marketplace=ebay&day=...);
// everything that is shown follows from it. Texts go into the page as text only, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const ALL = -1;
const byId = (id) => document.getElementById(id);
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

// The choice ---------------------------------------------------------------------------------------------------------

const periodOf = (days) => data.periods.find((period) => String(period.days) === days);
const usualPeriod = data.periods.findLast((period) => period.days <= 28);

function readChoice() {
  const given = new URLSearchParams(location.hash.slice(1));
  const place = (names, name) => (given.has(name) ? names.indexOf(given.get(name)) : ALL);
  const choice = {
    marketplace: place(data.marketplaces, "marketplace"),
    action: place(data.actions, "action"),
    period: periodOf(given.get("days")) ?? usualPeriod,
    day: place(data.days, "day"),
  };
  const unknown = ["marketplace", "action", "day"].filter((name) => given.has(name) && choice[name] === ALL);
  if (given.has("days") && !periodOf(given.get("days"))) unknown.push("days");
  const notice = byId("not-here");
  notice.hidden = !unknown.length;
  notice.textContent = `Not on this page, so left out: ${unknown.map((name) => `${name} ${given.get(name)}`).join(", ")}.`;
  return choice;
}

function address(changes) {
  const { marketplace, action, period, day } = { ...choice, ...changes };
  const parts = new URLSearchParams();
  if (marketplace !== ALL) parts.set("marketplace", data.marketplaces[marketplace]);
  if (action !== ALL) parts.set("action", data.actions[action]);
  if (period !== usualPeriod) parts.set("days", period.days);
  if (day !== ALL) parts.set("day", data.days[day]);
  return `#${parts}`;
}

const isChosen = (marketplace, action) =>
  (choice.marketplace === ALL || choice.marketplace === marketplace) && (choice.action === ALL || choice.action === action);
const chosenMarketplaces = () => [...data.marketplaces.keys()].filter((one) => isChosen(one, choice.action));
const nameOf = (marketplace, action) =>
  [marketplace === ALL ? "all marketplaces" : data.marketplaces[marketplace], action === ALL ? "all actions" : data.actions[action]].join(", ");

// Numbers and tables -------------------------------------------------------------------------------------------------

const NONE = "\u2013";
const or = (format) => (value) => (value === null || value === undefined ? NONE : format(value));
const count = or((value) => value.toLocaleString("en", { maximumFractionDigits: 0 }));
const percent = or((value) => `${(100 * value).toFixed(1)} %`);
const duration = or((ms) => {
  for (const [unit, size] of [["h", 3600000], ["min", 60000], ["s", 1000]]) if (ms >= size) return `${(ms / size).toFixed(1)} ${unit}`;
  return `${Math.round(ms)} ms`;
});
const signed = (value, text) => (value > 0 ? "+" : value < 0 ? "\u2212" : "\u00b1") + text(Math.abs(value));
const MEASURES = {
  total_jobs: ["jobs", count, 0],
  failure_count: ["failed", count, 0],
  success_rate: ["success", percent, 1],
  avg_duration_ms: ["mean duration", duration, -1],
  p50_duration_ms: ["p50 duration", duration, -1],
  p95_duration_ms: ["p95 duration", duration, -1],
  p99_duration_ms: ["p99 duration", duration, -1],
  p50_wait_ms: ["p50 wait", duration, -1],
  p95_wait_ms: ["p95 wait", duration, -1],
  cancelled_count: ["cancelled", count, 0],
  expired_count: ["expired", count, 0],
  retry_count: ["retries", count, 0],
  total_tasks: ["tasks", count, 0],
  task_failure_count: ["failed tasks", count, 0],
};
const at = (name) => data.shown.indexOf(name);
const ofDay = (marketplace, action, name, day) => data.daily[`${marketplace},${action}`]?.[name][day];
const ofPeriod = (period, marketplace, action) => period.cells[`${marketplace},${action}`] ?? [null, null, []];

// The columns of a table: a header, how a value is shown, and where text stands. A cell is a value, or [value, address].
const text = (header) => ({ header, className: "text", show: or(String) });
const prose = (header) => ({ header, className: "text prose", show: or(String) });
const number = (header, show) => ({ header, show });
const measure = (name, header) => number(header ?? MEASURES[name][0], MEASURES[name][1]);

function tableOf(caption, columns, rows, headers = 1, empty = "nothing") {
  if (!rows.length) return element("p", { className: "about" }, `${caption}: ${empty}.`);
  const head = element("tr", {}, ...columns.map((column) => element("th", { scope: "col", className: column.className ?? "" }, column.header)));
  const body = rows.map((row) => element("tr", {}, ...row.map((cell, place) => {
    const [value, href, className] = Array.isArray(cell) ? cell : [cell];
    const shown = columns[place].show(value);
    const made = element(place < headers ? "th" : "td", { className: `${columns[place].className ?? ""} ${className ?? ""}` });
    if (place < headers) made.scope = "row";
    made.append(href ? element("a", { href }, shown) : shown);
    return made;
  })));
  const table = element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body));
  // What scrolls can be reached by the keyboard.
  const wide = element("div", { className: "wide", tabIndex: 0 }, table);
  wide.setAttribute("role", "region");
  wide.setAttribute("aria-label", caption);
  const save = element("button", { type: "button", onclick: () => saveCsv(caption, columns, rows) }, "Save as CSV");
  save.setAttribute("aria-label", `Save as CSV: ${caption}`);
  return element("div", {}, wide, save);
}

function csvOf(columns, rows) {
  const field = (value) => {
    let shown = value === null || value === undefined ? "" : String(value);
    // A spreadsheet would take such a text for a formula, and do what it says.
    if (typeof value === "string" && /^[=+\-@\t\r\n]/.test(shown)) shown = `'${shown}`;
    return /[",\r\n]/.test(shown) ? `"${shown.replaceAll('"', '""')}"` : shown;
  };
  const lines = [columns.map((column) => column.header), ...rows.map((row) => row.map((cell) => (Array.isArray(cell) ? cell[0] : cell)))];
  return lines.map((line) => line.map(field).join(",")).join("\r\n") + "\r\n";
}

function saveCsv(caption, columns, rows) {
  const href = URL.createObjectURL(new Blob(["\ufeff", csvOf(columns, rows)], { type: "text/csv" }));
  const name = caption.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  element("a", { href, download: `${name}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

// Many rows are made when they are looked at.
function fillWhenOpen(details, make) {
  const fill = () => {
    details.querySelectorAll(":scope > :not(summary)").forEach((one) => one.remove());
    if (details.open) details.append(make());
  };
  details.ontoggle = fill;
  fill();
}

// The sections -------------------------------------------------------------------------------------------------------

let choice;
const shownDays = () => [...data.days.keys()].slice(-choice.period.days);
const newestFirst = (days) => [...days].reverse();
const dayCell = (day) => [data.days[day], address({ day })];
const isIncomplete = (day) => data.incomplete.includes(day);
const weekday = (day) => new Date(data.days[day]).toLocaleDateString("en", { weekday: "long", timeZone: "UTC" });

function showPeriod() {
  const { period, marketplace, action } = choice;
  const [now, before, change] = ofPeriod(period, marketplace, action);
  const days = shownDays();
  byId("period-title").textContent = `The last ${period.days} days: ${nameOf(marketplace, action)}`;
  byId("period-about").textContent = [
    `From ${data.days[days[0]]} to ${data.last}, against the ${period.days} days before.`,
    period.has_before ? "" : "The data do not go back far enough to compare.",
    period.left_out.length ? `Left out as incomplete, with the days that they would be compared with: ${period.left_out.join(", ")}.` : "",
  ].join(" ");
  const rows = data.shown.map((name, place) => {
    const [header, show, better] = MEASURES[name];
    const by = period.has_before ? change[place] ?? null : null;
    const isPoints = name === "success_rate";
    const shown = by === null ? NONE : isPoints ? `${signed(100 * by, (points) => points.toFixed(1))} points` : signed(by, percent);
    // Coloured is what is clearly better or worse; the sign says it, too.
    const tone = Math.abs(by) < (isPoints ? 0.01 : 0.1) ? "" : by * better > 0 ? "good" : by * better < 0 ? "bad" : "";
    return [header, show(now?.[place]), show(period.has_before ? before?.[place] : null), [shown, null, tone]];
  });
  byId("period-table").replaceChildren(tableOf(
    `${nameOf(marketplace, action)}, last ${period.days} days`,
    [text("measure"), number("this period", String), number("before", String), number("change", String)], rows));
}

function showBadDays() {
  const first = shownDays()[0];
  const rows = data.bad_days
    .filter(([day, marketplace]) => day >= first && isChosen(marketplace, choice.action))
    .map(([day, marketplace, jobs, failed, rate, usual]) => [
      [data.days[day], address({ day, marketplace })], data.marketplaces[marketplace], jobs, failed, rate, usual]);
  byId("bad-days").replaceChildren(tableOf("Bad days, all actions together",
    [text("day"), text("marketplace"), number("jobs", count), number("failed", count), number("success", percent), number("28 days before", percent)],
    rows, 1, "none"));
}

const views = {};
let drawing = Promise.resolve();

function draw(name, points, days) {
  const marked = shownDays().filter(isIncomplete).map((day) => ({ date: data.days[day], why: "incomplete" }));
  if (choice.day !== ALL && shownDays().includes(choice.day)) marked.push({ date: data.days[choice.day], why: "chosen" });
  // One after the other, so that none is drawn over a later one.
  drawing = drawing.then(async () => {
    views[name]?.finalize();
    const spec = { ...structuredClone(data.charts[name]), datasets: { points, failures: points, days, marked } };
    if (!days.length) spec.height = 24 * (new Set(points.map((point) => point.action)).size + 1);
    if (!marked.length) spec.layer?.shift(); // An empty scale would be warned of.
    views[name] = await vegaEmbed(byId(`chart-${name}`), spec, {
      renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip: { disableDefaultStyle: true },
    });
    views[name].view.addEventListener("click", (_, item) => {
      if (item?.datum?.go) location.hash = item.datum.go;
    });
  });
}

function showCharts() {
  const days = shownDays();
  const marketplaces = chosenMarketplaces();
  for (const [chart, names] of Object.entries({
    jobs: ["total_jobs"],
    success: ["success_rate"],
    duration: ["p50_duration_ms", "p95_duration_ms"],
    wait: ["p50_wait_ms", "p95_wait_ms"],
  })) {
    const isTime = names.length > 1;
    const columns = marketplaces.flatMap((one) => names.map((name) =>
      measure(name, isTime ? `${data.marketplaces[one]} ${MEASURES[name][0].slice(0, 3)}` : data.marketplaces[one])));
    const values = (day) => marketplaces.flatMap((one) => names.map((name) => ofDay(one, choice.action, name, day) ?? null));
    const points = days.flatMap((day) => marketplaces.map((one) => ({
      date: data.days[day], marketplace: data.marketplaces[one], marketplace_order: one,
      // A logarithmic axis has no zero.
      ...Object.fromEntries(names.map((name) => [name, ofDay(one, choice.action, name, day) ?? null])
        .map(([name, value]) => [name, isTime && value !== null ? Math.max(value, 1) : value])),
    })));
    const lines = (day) => [
      `${data.days[day]}, ${weekday(day)}${isIncomplete(day) ? ", incomplete" : ""}`,
      ...values(day).map((value, place) => `${columns[place].header}: ${columns[place].show(value)}`),
      ...(chart === "success" ? marketplaces.map((one) =>
        `${data.marketplaces[one]} failed: ${count(ofDay(one, choice.action, "failure_count", day))} of ${count(ofDay(one, choice.action, "total_jobs", day))}`) : []),
    ].join("\n");
    draw(chart, points, days.map((day) => ({ date: data.days[day], text: lines(day), go: address({ day }) })));
    const title = byId(`numbers-${chart}`).closest("figure").querySelector("h3").textContent;
    fillWhenOpen(byId(`numbers-${chart}`), () => tableOf(
      `${title}, ${nameOf(choice.marketplace, choice.action)}`, [text("day"), ...columns],
      newestFirst(days).map((day) => [dayCell(day), ...values(day)])));
  }
  showFailures();
}

function showFailures() {
  const failed = (marketplace, action) => ofPeriod(choice.period, marketplace, action)[0]?.[at("failure_count")] ?? 0;
  const marketplaces = chosenMarketplaces();
  const actions = [...data.actions.keys()]
    .filter((action) => (choice.action === ALL || choice.action === action) && failed(choice.marketplace, action))
    .sort((a, b) => failed(choice.marketplace, b) - failed(choice.marketplace, a));
  const points = actions.flatMap((action) => marketplaces.map((one) => ({
    action: data.actions[action], marketplace: data.marketplaces[one], marketplace_order: one, failure_count: failed(one, action),
    text: `${data.actions[action]}, ${data.marketplaces[one]}\nfailed: ${count(failed(one, action))}`, go: address({ action }),
  })));
  draw("failures", points, []);
  fillWhenOpen(byId("numbers-failures"), () => tableOf(`Failed jobs by action, last ${choice.period.days} days`,
    [text("action"), ...marketplaces.map((one) => number(data.marketplaces[one], count))],
    actions.map((action) => [[data.actions[action], address({ action })], ...marketplaces.map((one) => failed(one, action))])));
}

// Of a row of `cells`: the marketplace and the action, each with the address that chooses it.
const who = (marketplace, action) => [
  [data.marketplaces[marketplace], address({ marketplace })], [data.actions[action], address({ marketplace, action })]];

function showActions() {
  const names = ["total_jobs", "failure_count", "success_rate", "p95_duration_ms", "p95_wait_ms"];
  const rows = Object.entries(choice.period.cells)
    .map(([key, cell]) => [...key.split(",").map(Number), ...cell])
    .filter(([marketplace, action]) => marketplace !== ALL && action !== ALL && isChosen(marketplace, action))
    .filter(([, , now, before]) => [now, before].some((of) => of[at("total_jobs")]))
    .sort((a, b) => b[2][at("failure_count")] - a[2][at("failure_count")])
    .map(([marketplace, action, now, before]) => [...who(marketplace, action),
      ...names.flatMap((name) => [now[at(name)], choice.period.has_before ? before[at(name)] : null])]);
  byId("actions").replaceChildren(tableOf(`By marketplace and action, last ${choice.period.days} days, and the ${choice.period.days} before`,
    [text("marketplace"), text("action"), ...names.flatMap((name) => [measure(name), measure(name, `${MEASURES[name][0]} before`)])], rows, 2));
}

const CHANGE_COLUMNS = [
  text("marketplace"), text("action"), text("cause"), text("changed at"), text("customers"),
  ...["jobs before", "jobs after", "failed before", "failed after", "late", "corrected", "moved in", "moved out", "forgotten"].map((name) => number(name, count)),
  text("run"),
];

function changesOf(isShown) {
  return data.changes
    .filter(([day, marketplace, action]) => isShown(day) && isChosen(marketplace, action))
    .map(([day, marketplace, action, cause, when, run, tenant, tenants, ...numbers]) => [
      dayCell(day), data.marketplaces[marketplace], data.actions[action], data.texts[cause], data.texts[when],
      data.texts[tenant] + (tenants > 1 ? ` and ${count(tenants - 1)} more` : ""), ...numbers, data.texts[run].slice(0, 8)]);
}

function showChanges() {
  const first = shownDays()[0];
  const rows = changesOf((day) => day >= first);
  byId("changes").querySelector("summary").textContent = rows.length ? `${count(rows.length)} changes` : "No changes";
  fillWhenOpen(byId("changes"), () => tableOf("Changes of settled days", [text("day"), ...CHANGE_COLUMNS], rows));
}

function showDay() {
  const { day, marketplace, action } = choice;
  byId("day").hidden = day === ALL;
  if (day === ALL) return;
  byId("day-title").textContent = `${weekday(day)}, ${data.days[day]}: ${nameOf(marketplace, action)}`;
  for (const [id, to, name] of [["day-before", day - 1, "\u2190 the day before"], ["day-after", day + 1, "the day after \u2192"]]) {
    byId(id).hidden = !(to in data.days);
    byId(id).textContent = name;
    byId(id).href = address({ day: to });
  }
  byId("day-close").href = address({ day: ALL });
  const value = (name) => MEASURES[name][1](ofDay(marketplace, action, name, day));
  byId("day-about").textContent = [
    `${value("total_jobs")} jobs, ${value("failure_count")} failed; ${value("success_rate")} succeeded.`,
    day < data.details_from ? `Reasons and customers are on this page from ${data.days[data.details_from]} on.` : "",
    `${data.completeness[day]}${isIncomplete(day) ? ", so the day is incomplete" : ""}.`,
  ].join(" ");

  const names = ["total_jobs", "failure_count", "success_rate", "p50_duration_ms", "p95_duration_ms", "p95_wait_ms", "cancelled_count"];
  const cells = Object.keys(data.daily).map((key) => key.split(",").map(Number))
    .filter(([one, other]) => one !== ALL && other !== ALL && isChosen(one, other))
    .map(([one, other]) => [one, other, names.map((name) => ofDay(one, other, name, day))])
    .filter(([, , numbers]) => numbers[0] || numbers.at(-1))
    .sort((a, b) => b[2][1] - a[2][1] || b[2][0] - a[2][0]);
  const usual = (one, other) => ofPeriod(choice.period, one, other)[0]?.[at("success_rate")] ?? null;
  byId("day-actions").replaceChildren(tableOf(`Actions on ${data.days[day]}`,
    [text("marketplace"), text("action"), ...names.map((name) => measure(name)), number(`success in ${choice.period.days} days`, percent)],
    cells.map(([one, other, numbers]) => [...who(one, other), ...numbers, usual(one, other)]), 2));

  const reasons = (data.reasons[day] ?? []).filter(([one, other]) => isChosen(one, other)).sort((a, b) => b[3] - a[3]);
  byId("day-reasons").replaceChildren(tableOf(`Why jobs failed on ${data.days[day]}`,
    [prose("reason"), text("marketplace"), text("action"), number("jobs", count), ...(data.tenant ? [] : [number("customers", count)])],
    reasons.map(([one, other, reason, jobs, tenants]) => [
      data.texts[reason], data.marketplaces[one], data.actions[other], jobs, ...(data.tenant ? [] : [tenants])]), 1, "no reason is stored"));

  showCustomers();
  const changes = changesOf((one) => one === day).map((row) => row.slice(1));
  byId("day-changes").replaceChildren(tableOf(`Changes of ${data.days[day]} after it was settled`, CHANGE_COLUMNS, changes, 1, "none"));
}

function showCustomers() {
  if (data.tenant) return;
  const found = new Map();
  for (const [tenant, one, other, jobs, failed, reason, reasonJobs] of data.customers[choice.day] ?? []) {
    if (!isChosen(one, other)) continue;
    const known = found.get(tenant) ?? { jobs: 0, failed: 0, most: 0, where: "", reason: null, reasonJobs: 0 };
    known.jobs += jobs;
    known.failed += failed;
    if (failed > known.most) {
      Object.assign(known, { most: failed, where: `${data.marketplaces[one]} ${data.actions[other]}: ${count(failed)}` });
    }
    if (reasonJobs > known.reasonJobs) Object.assign(known, { reason: data.texts[reason], reasonJobs });
    found.set(tenant, known);
  }
  const rows = [...found].filter(([, known]) => known.failed).sort((a, b) => b[1].failed - a[1].failed)
    .map(([tenant, known]) => [data.texts[tenant], known.jobs, known.failed, (known.jobs - known.failed) / known.jobs, known.where, known.reason, known.reasonJobs]);
  byId("day-customers").replaceChildren(tableOf(`Customers with the most failed jobs on ${data.days[choice.day]}`,
    [text("customer"), number("jobs", count), number("failed", count), number("success", percent),
      text("most failed"), prose("most frequent reason"), number("its jobs", count)], rows, 1, "none"));
}

// Together -----------------------------------------------------------------------------------------------------------

const form = byId("choice");
const fill = (select, options) => select.replaceChildren(...options.map(([value, name]) => element("option", { value }, name)));
fill(form.marketplace, [["", "all"], ...data.marketplaces.map((name) => [name, name])]);
fill(form.action, [["", "all"], ...data.actions.map((name) => [name, name])]);
fill(form.days, data.periods.map(({ days }) => [days, `${days} days`]));
form.onchange = () => {
  location.hash = address({
    marketplace: data.marketplaces.indexOf(form.marketplace.value),
    action: data.actions.indexOf(form.action.value),
    period: periodOf(form.days.value),
  });
};
form.onsubmit = (event) => event.preventDefault();

function show() {
  const dayBefore = choice?.day ?? ALL;
  choice = readChoice();
  byId("charts").ariaBusy = "true";
  form.marketplace.value = data.marketplaces[choice.marketplace] ?? "";
  form.action.value = data.actions[choice.action] ?? "";
  form.days.value = choice.period.days;
  for (const item of byId("legend").children) item.hidden = !isChosen(data.marketplaces.indexOf(item.dataset.marketplace), choice.action);
  showPeriod();
  showBadDays();
  showCharts();
  showDay();
  showActions();
  showChanges();
  const drawn = (drawing = drawing.then(() => {
    if (drawn === drawing) byId("charts").ariaBusy = "false";
    if (choice.day === ALL || choice.day === dayBefore) return;
    byId("day-title").focus({ preventScroll: true });
    byId("day").scrollIntoView();
  }));
}
window.onhashchange = show;
show();
