/* Turns the data of each new chart of a page into an interactive one, without libraries.
   A reader's choices in a chart with a key outlive its replacement. */
(() => {
  const [HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [288, 62, 12, 10, 42]; // of the plot, around it
  const COLORS = ["blue", "orange", "green", "rose"]; // of page.css
  const DASHES = ["", "6 4", "2 4", "9 4 2 4"]; // of each four curves
  const HINT = "drag: zoom · shift-drag: pan · double-click: show all · click a name: hide";
  const escape = (text) => text.replace(/[&<>"]/g, (one) => `&#${one.charCodeAt(0)};`);

  const look = (number) =>
    `stroke="var(--${COLORS[number % 4]})" stroke-dasharray="${DASHES[(number >> 2) % 4]}"`;

  function format(value, compact = false) {
    const size = Math.abs(value);
    if (!Number.isFinite(value)) return value === Infinity ? "not finite" : "–";
    if (size && (size < 1e-4 || size >= 1e12)) return Number(value.toPrecision(4)).toExponential();
    const digits = { notation: "compact", maximumSignificantDigits: 4 };
    if (compact) return value.toLocaleString("en-US", digits);
    const whole = size >= 1000 || Number.isInteger(value);
    return whole ? Math.round(value).toLocaleString("en-US") : value.toPrecision(4);
  }

  function tickValues(low, high, log, most) {
    const span = Math.log10(high / low);
    const count = (first, size) => Array.from({ length: most + 2 }, (_, n) => first + n * size);
    const power = 10 ** Math.floor(Math.log10((high - low) / most));
    const step = power * [1, 2, 5, 10].find((digit) => digit * power * most >= high - low);
    let found = count(Math.ceil(low / step), 1).map((number) => number * step);
    if (log && high >= 12 * low) { // else a logarithmic axis has the ticks of a linear one
      const powers = count(Math.floor(Math.log10(low)), Math.ceil(span / most));
      const digits = span * 3 <= most ? [1, 2, 5] : [1];
      found = powers.flatMap((one) => digits.map((digit) => Number(`${digit}e${one}`)));
    }
    return found.filter((value) => value >= low && value <= high);
  }

  /* A scale from values, or a range that is zoomed, to pixels; null without values. */
  function makeScale(values, length, log, margin, most, zoom) {
    const known = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
    if (!known.length) return null;
    const [to, back] = log ? [Math.log10, (v) => 10 ** v] : [Number, Number];
    const ends = [Math.min, Math.max].map((best) => to(known.reduce((a, b) => best(a, b))));
    const pad = (ends[1] - ends[0]) * margin || Math.abs(ends[1]) * 0.1 || 1;
    const whole = [ends[0] - pad, ends[1] + pad];
    const zoomed = zoom && !(log && zoom[0] <= 0);
    const [start, end] = zoomed ? zoom.map(to) : whole;
    const place = (value) => ((to(value) - start) / (end - start)) * length;
    const value = (pixel) => back(start + (pixel / length) * (end - start));
    return { place, value, ticks: tickValues(value(0), value(length), log, most) };
  }

  function smooth(mean, rows, weight) { // as in curves.py
    let [total, mass] = [0, 0];
    return mean.map((value, at) => {
      const past = weight ** rows[at];
      total = past * total + (1 - past) * value;
      mass = past * mass + 1 - past;
      const average = total / mass;
      if (!Number.isFinite(average)) total = mass = 0;
      return average;
    });
  }

  function nearest(places, target) { // the last of equals
    const away = places.map((place) => Math.abs(place - target));
    return away.reduce((best, distance, row) => (distance <= away[best] ? row : best), 0);
  }

  function start(source) {
    const host = source.parentNode;
    const data = JSON.parse(source.textContent);
    const state = states.get(data.key) ?? { ...data.choices, hidden: {} };
    if (data.key) states.set(data.key, state);
    if (!data.ys[state.y]) state.y = data.choices.y;
    const options = (labels) => Object.entries(labels).map(([name, { label = labels[name] }]) =>
      `<option value="${name}">${label.split(" (")[0]}</option>`).join("");
    host.innerHTML = `
      <div class="title">${escape(data.title)}</div>
      <div class="faint">${escape(data.subtitle)}</div>
      <div class="controls">
        <select name="y">${options(data.ys)}</select>
        <select name="x">${options(data.x)}</select>
        <label class="smoothing">smoothing
          <input type="range" name="smoothing"><output></output></label>
        <label><input type="checkbox" name="log_x"> log x</label>
        <label><input type="checkbox" name="log_y"> log y</label>
      </div>
      <svg height="${TOP + HEIGHT + BOTTOM}"></svg><table></table><div class="faint">${HINT}</div>`;
    const find = (selector) => host.querySelector(selector);
    const [picture, table] = [find("svg"), find("table")];
    let [curves, scales, width] = [[], {}, 0];
    const isLogY = () => state.log_y ?? data.ys[state.y].log;
    const weight = () => state.smoothing ?? data.smoothing;
    const visible = () => curves.filter(({ name }) => !state.hidden[name]);

    /* Read the curves of the chosen quantity and axis, and fit the axes to them. */
    function prepare() {
      const toNumbers = (values) => values.map((value) => Number(value ?? NaN));
      curves = data.ys[state.y].curves.map((curve) => {
        const grid = data.runs[curve.run][curve.role];
        const [mean, places] = [curve.mean, grid[state.x]].map(toNumbers);
        const [low, high] = [curve.low ?? mean, curve.high ?? mean].map(toNumbers);
        const line = curve.role === "train" ? smooth(mean, grid.rows, weight()) : mean;
        return { ...curve, places, mean, low, high, line };
      });
      const all = visible().flatMap(({ places }) => places);
      const x = makeScale(all, width, state.log_x, 0.015, Math.ceil(width / 90), state.zoom);
      const inside = visible().flatMap(({ places, low, high }) => places.flatMap((place, row) => {
        const pixel = x?.place(place);
        return pixel >= 0 && pixel <= width ? [low[row], high[row]] : [];
      }));
      scales = { x, y: makeScale(inside, HEIGHT, isLogY(), 0.05, 6) };
    }

    function draw() {
      width = Math.max(100, picture.getBoundingClientRect().width - LEFT - RIGHT);
      prepare();
      for (const name of ["x", "y"]) find(`[name=${name}]`).value = state[name];
      find("[name=log_x]").checked = state.log_x ?? false;
      find("[name=log_y]").checked = isLogY();
      find("[name=smoothing]").value = -25 * Math.log10(1 - weight());
      find("output").textContent = Number(weight().toFixed(4));
      const inner = scales.y
        ? `${drawAxes()}<svg width="${width}" height="${HEIGHT}">
            ${visible().map(drawCurve).join("")}</svg><g class="hover"></g>`
        : `<text x="${width / 2}" y="${HEIGHT / 2}">
            no ${curves.length ? "values here" : "rows yet"}</text>`;
      picture.innerHTML = `<g transform="translate(${LEFT},${TOP})">${inner}</g>`;
      fillTable();
    }

    const pixelY = (value) => HEIGHT - scales.y.place(value);
    const pixels = (place, value) => [scales.x.place(place), pixelY(value)];

    function drawAxes() {
      const across = scales.y.ticks.map((tick) => `
        <path class="grid" d="M0,${pixelY(tick)}h${width}"/>
        <text class="y" x="-8" y="${pixelY(tick) + 4}">${format(tick, true)}</text>`);
      const along = scales.x.ticks.map((tick) => `
        <g transform="translate(${scales.x.place(tick)},${HEIGHT})"><path class="grid" d="M0,0v4"/>
        <text class="x" y="17">${format(tick, true)}</text></g>`);
      return `${across.join("")}${along.join("")}<path class="grid" d="M0,${HEIGHT}h${width}"/>
        <text x="${width / 2}" y="${HEIGHT + 36}">${data.x[state.x]}</text>
        <text x="${-HEIGHT / 2}" y="-50" transform="rotate(-90)">${data.ys[state.y].label}</text>`;
    }

    /* The path through the values of each row, with its gaps; a lone point is a dot. */
    function path(places, ...lists) {
      let [text, pen] = ["", "M"];
      places.forEach((place, row) => lists.forEach((values) => {
        const point = pixels(place, values[row]);
        const drawn = point.every(Number.isFinite);
        if (drawn) text += `${pen}${point.map((one) => one.toFixed(1))}${pen === "M" ? "h0" : ""}`;
        pen = drawn ? "L" : "M";
      }));
      return text;
    }

    function drawCurve({ run, role, number, places, low, high, mean, line }) {
      const every = Math.ceil(places.length / 24);
      const dots = places.map((place, row) => (row % every ? "" : path([place], [mean[row]])));
      const lost = places.filter((place, row) => mean[row] === Infinity).map(scales.x.place);
      const resumes = data.runs[run].resume[state.x].map(scales.x.place);
      return `<g ${look(number)}>
        <path class="raw" d="${role === "train" ? path(places, low, high) : ""}"/>
        <path class="${role}" d="${path(places, line)}"/>
        <path class="dots" d="${role === "eval" || places.length < 2 ? dots.join("") : ""}"/>
        <path class="lost" d="${lost.map((x) => `M${x - 4},4l8,8m0,-8l-8,8`).join("")}"/>
        <path class="resume" d="${resumes.map((x) => `M${x},0v${HEIGHT}`).join("")}"/></g>`;
    }

    /* The legend: each name with its values at a place, or else the last. */
    function fillTable(target = Number.MAX_VALUE) {
      const rows = [...new Set(curves.map(({ name }) => name))].map((name) => {
        const group = curves.filter((curve) => curve.name === name);
        const read = (list, ...roles) => {
          const curve = group.find(({ role }) => roles.includes(role));
          return curve ? format(curve[list][nearest(curve.places, target)]) : "";
        };
        const ends = new Set([read("low", "train"), read("high", "train")]);
        const values = [read("places", "train", "eval"), [...ends].join(" – ")];
        values.push(read("line", "train"), read("mean", "eval"));
        return `<tr class="${state.hidden[name] ? "off" : ""}" data-key="${escape(name)}"><td>
          <button><svg width="26" height="12" ${look(group[0].number)}><path d="M1,6h24"/>
          <path class="dots" d="${read("mean", "eval") && "M13,6h0"}"/></svg>
          ${escape(name)}</button></td>
          ${values.map((text) => `<td>${text}</td>`).join("")}</tr>`;
      });
      const heads = ["", state.x, "training", "smoothed", "validation"];
      table.innerHTML = heads.map((head) => `<th>${head}</th>`).join("") + rows.join("");
    }

    /* Read every curve at a place of the picture. */
    function showPoint(x) {
      const target = scales.x.value(x);
      const dots = visible().map(({ places, line, number }) => {
        const row = nearest(places, target);
        return `<path class="dots" ${look(number)} d="${path([places[row]], [line[row]])}"/>`;
      });
      find(".hover").innerHTML = `<path class="grid" d="M${x},0v${HEIGHT}"/>${dots.join("")}`;
      fillTable(target);
    }

    function listen() {
      let from = null;
      const xOf = ({ clientX }) => clientX - picture.getBoundingClientRect().left - LEFT;
      const zoom = (...ends) => {
        state.zoom = ends.sort((a, b) => a - b).map(scales.x.value);
        draw();
      };
      picture.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        picture.setPointerCapture(event.pointerId);
        from = xOf(event);
      });
      picture.addEventListener("pointermove", (event) => {
        const x = xOf(event);
        if (!scales.y) return;
        if (!event.buttons) from = null; // a touch that became a scroll has no end
        if (from === null) {
          showPoint(x);
        } else if (event.shiftKey) {
          zoom(from - x, from - x + width);
          from = x;
        } else {
          const size = `x="${Math.min(x, from)}" width="${Math.abs(x - from)}"`;
          find(".hover").innerHTML = `<rect ${size} height="${HEIGHT}"/>`;
        }
      });
      picture.addEventListener("pointerup", (event) => {
        const [x, begin] = [xOf(event), from ?? NaN];
        from = null;
        if (scales.y && !event.shiftKey && Math.abs(x - begin) > 5) zoom(begin, x);
      });
      picture.addEventListener("pointerleave", () => from ?? draw());
      picture.addEventListener("dblclick", () => {
        state.zoom = null;
        draw();
      });
      find(".controls").addEventListener("input", ({ target: { name, type, value, checked } }) => {
        state[name] = type === "checkbox" ? checked : value;
        if (name === "smoothing") state.smoothing = 1 - 10 ** (-value / 25); // 100 is 0.9999
        if (name === "y") state.log_y = null;
        if (name === "x") state.zoom = null;
        draw();
      });
      table.addEventListener("click", ({ target }) => {
        const { key } = target.closest("tr")?.dataset ?? {};
        state.hidden[key] = !state.hidden[key];
        draw();
      });
      new ResizeObserver(draw).observe(host);
    }

    listen();
    draw();
  }

  const states = (window.minimindCharts ??= new Map());
  document.querySelectorAll(".minimind-chart > script").forEach(start);
})();
