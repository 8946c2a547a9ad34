/* Turns the data of each new chart of a page into an interactive one, without libraries.
   A reader's choices in a chart with a key outlive its replacement. */
(() => {
  const HEIGHT = 340;
  const MARGIN = { left: 62, right: 12, top: 10, bottom: 42 };
  const LEAST_RATIO = 12; // of an axis' ends for ticks at equal ratios
  const TALL = 40; // pixels of a range that is dragged on both axes
  // Corners and turn of each run's marker.
  const MARKERS = [[4, 0.125], [24, 0], [3, 0], [4, 0], [3, 0.5], [5, 0], [6, 0], [3, 0.25]];
  const HINT = "drag: zoom · shift-drag: pan · double-click: show all · click a name: hide";

  const escape = (text) => text.replace(/[&<>"]/g, (one) => `&#${one.charCodeAt(0)};`);
  const isPositive = (value, log) => value !== null && !(log && value <= 0);

  function format(value, least = 4, short = false) {
    if (value === null || !Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size && (size < 1e-4 || size >= 1e12)) return value.toExponential(2);
    const digits = { minimumSignificantDigits: least, maximumSignificantDigits: 4 };
    if (short && size >= 1e5) digits.notation = "compact";
    else if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return value.toLocaleString("en-US", digits);
  }

  function tickValues(low, high, log, most) {
    const found = [];
    if (log && high >= LEAST_RATIO * low) {
      const span = Math.log10(high / low);
      const digits = span * 3 <= most ? [1, 2, 5] : [1];
      for (let power = Math.floor(Math.log10(low)); 10 ** power <= high;) {
        found.push(...digits.map((digit) => Number(`${digit}e${power}`)));
        power += Math.ceil(span / most);
      }
    } else {
      const rough = (high - low) / most;
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
      const first = Math.ceil(low / step);
      found.push(...Array.from({ length: most + 1 }, (_, n) => (first + n) * step));
    }
    return found.filter((value) => value >= low && value <= high);
  }

  /* A scale from values to `length` pixels; null if there is no value to show. */
  function makeScale(values, zoom, log, length, margin, most) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (!isPositive(value, log)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (low > high) return null;
    const [to, back] = log ? [Math.log10, (v) => 10 ** v] : [(v) => v, (v) => v];
    const pad = (to(high) - to(low)) * margin || (log ? 0.1 : Math.abs(high) * 0.1 || 1);
    const fitting = zoom && isPositive(zoom[0], log);
    const [start, end] = fitting ? zoom.map(to) : [to(low) - pad, to(high) + pad];
    const place = (value) => ((to(value) - start) / (end - start)) * length;
    const value = (pixel) => back(start + (pixel / length) * (end - start));
    const lacks = log && values.some((one) => one !== null && one <= 0);
    const ticks = tickValues(value(0), value(length), log, most);
    return { log, place, value, ticks, note: lacks ? " · only values above 0" : "" };
  }

  function smooth({ mean, rows }, weight) { // as `Curve.smooth` in curves.py
    let [total, mass] = [0, 0];
    return mean.map((value, at) => {
      const past = value === null ? 0 : weight ** rows[at];
      total = past * total + (1 - past) * value;
      mass = past * mass + (value === null ? 0 : 1 - past);
      return value === null ? null : total / mass;
    });
  }

  function decode(data) {
    for (const quantity of Object.values(data.ys)) {
      quantity.curves = quantity.curves.map((curve) => {
        const at = data.runs[curve.run].grids[curve.role === "eval" ? "eval" : "train"];
        return { low: curve.mean, high: curve.mean, ...curve, at, rows: at.rows };
      });
    }
  }

  function nearest(places, target) {
    let [low, high] = [0, places.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (places[middle] < target) low = middle;
      else high = middle;
    }
    return target - places[low] <= places[high] - target ? low : high;
  }

  function marker(number, x, y, size = 4) {
    const [sides, turn] = MARKERS[Math.max(0, number) % 8];
    const corners = Array.from({ length: sides }, (_, corner) => {
      const angle = 2 * Math.PI * (corner / sides + turn);
      return [x + size * Math.sin(angle), y - size * Math.cos(angle)].map((one) => one.toFixed(1));
    });
    return `M${corners.join("L")}Z`;
  }

  function fitTheme(host) {
    const { color } = getComputedStyle(host);
    const [red, green, blue] = color.match(/[\d.]+/g).map(Number);
    const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    host.classList.toggle("dark", luminance > (color.startsWith("rgb") ? 128 : 0.5));
  }

  function start(host) {
    host.drawn = true;
    const source = host.querySelector("script");
    const data = JSON.parse(source.textContent);
    decode(data);
    const state = states.get(data.key) ?? { ...data.choices, hidden: {}, zoom: {} };
    if (data.key) states.set(data.key, state);
    if (!data.ys[state.y]) Object.assign(state, { y: data.choices.y, zoom: {} });
    const names = (labels) => Object.entries(labels).map(([name, label]) =>
      `<option value="${name}">${escape(label.split(/ \(|,/)[0])}</option>`).join("");
    const labels = Object.entries(data.ys).map(([name, y]) => [name, y.label]);
    host.replaceChildren(source);
    host.classList.toggle("several", !data.alone);
    host.insertAdjacentHTML("beforeend", `
      <div class="title">${escape(data.title)}</div>
      <div class="faint">${escape(data.subtitle)}</div>
      <div class="controls">
        <select name="y">${names(Object.fromEntries(labels))}</select>
        <select name="x">${names(data.x)}</select>
        <label class="smoothing">smoothing <input type="range" name="smoothing"><output></output></label>
        <label><input type="checkbox" name="log_x"> log x</label>
        <label><input type="checkbox" name="log_y"> log y</label>
      </div>
      <svg height="${HEIGHT}"></svg><table></table><div class="faint"></div>`);
    const find = (selector) => host.querySelector(selector);
    const [picture, table] = [find("svg"), find("table")];
    let [curves, scales, width] = [[], {}, 0];
    const height = HEIGHT - MARGIN.top - MARGIN.bottom;
    const isLogY = () => state.log_y ?? data.ys[state.y].log;
    const pixelX = (value) => scales.x.place(value);
    const pixelY = (value) => height - scales.y.place(value);
    const visible = () => curves.filter(({ key }) => !state.hidden[key]);

    /* The curves of the chosen quantity, smoothed, with colour and legend entry. */
    function prepare() {
      const all = data.ys[state.y].curves;
      const entries = [...new Set(all.filter(({ role }) => role !== "range").map((c) => c.name))];
      return all.map((curve) => {
        const entry = curve.name === "validation" ? 1 : entries.indexOf(curve.name);
        const number = data.alone ? entry : curve.run;
        const own = state.smoothing ?? data.runs[curve.run].smoothing;
        const weight = curve.role === "train" ? own : 0;
        const color = number < 0 ? "currentColor" : `var(--c${number % 8})`;
        const key = data.alone ? curve.name : String(curve.run);
        const rest = { places: curve.at[state.x], line: smooth(curve, weight) };
        return { ...curve, number, weight, color, key, ...rest };
      });
    }

    function fitScales() {
      const fit = (axis, log, values, length, margin, most) => {
        const scale = (asked) => makeScale(values, state.zoom[axis], asked, length, margin, most);
        const made = (log && scale(true)) || scale(false);
        if (log && made && !made.log) made.note = " · no value above 0";
        return made;
      };
      const places = visible().flatMap((curve) => curve.places);
      const x = fit("x", state.log_x, places, width, 0.015, Math.ceil(width / 90));
      const inside = [];
      for (const curve of x ? visible() : []) {
        curve.places.forEach((place, row) => {
          const pixel = x.place(place);
          if (pixel >= 0 && pixel <= width) inside.push(curve.low[row], curve.high[row]);
        });
      }
      return { x, y: fit("y", isLogY(), inside, height, 0.05, 6) };
    }

    function draw() {
      if (!host.isConnected) return;
      fitTheme(host);
      curves = prepare();
      for (const name of ["x", "y"]) find(`[name=${name}]`).value = state[name];
      find("[name=log_x]").checked = state.log_x;
      find("[name=log_y]").checked = isLogY();
      const weight = state.smoothing ?? data.runs[0].smoothing;
      find("[name=smoothing]").value = -25 * Math.log10(1 - weight);
      const auto = state.smoothing === null && !data.alone;
      find("output").textContent = auto ? "auto" : format(weight, 1);
      width = Math.max(100, picture.getBoundingClientRect().width - MARGIN.left - MARGIN.right);
      scales = fitScales();
      const center = `x="${width / 2}" text-anchor="middle"`;
      const none = curves.length ? "nothing to show here" : "no rows yet";
      const inner = scales.y
        ? `${drawAxes(center)}<svg width="${width}" height="${height}">
            ${drawResumes()}${visible().map(drawCurve).join("")}</svg><g class="hover"></g>`
        : `<text ${center} y="${height / 2}">${none}</text>`;
      picture.innerHTML = `<g transform="translate(${MARGIN.left},${MARGIN.top})">${inner}</g>`;
      fillTable();
    }

    function drawAxes(center) {
      const across = scales.y.ticks.map((tick) => `<path class="grid" d="M0,${pixelY(tick)}h${width}"/>
        <text x="-8" y="${pixelY(tick) + 4}" text-anchor="end">${format(tick, 1, true)}</text>`);
      const along = scales.x.ticks.map((tick) => `<path class="axis" d="M${pixelX(tick)},${height}v4"/>
        <text x="${pixelX(tick)}" y="${height + 17}" text-anchor="middle">${format(tick, 1, true)}</text>`);
      const turned = `transform="translate(-50,${height / 2}) rotate(-90)" text-anchor="middle"`;
      return `${across.join("")}${along.join("")}<path class="axis" d="M0,${height}h${width}"/>
        <text ${center} y="${height + 36}">${data.x[state.x]}${scales.x.note}</text>
        <text ${turned}>${data.ys[state.y].label}${scales.y.note}</text>`;
    }

    function drawResumes() {
      return data.runs.map(({ resumes }, run) => {
        if (!visible().some((curve) => curve.run === run)) return "";
        const places = resumes[state.x].filter((place) => isPositive(place, scales.x.log));
        const color = data.alone ? "currentColor" : `var(--c${run})`;
        const path = places.map((place) => `M${pixelX(place)},0v${height}`).join("");
        return `<path class="resume" stroke="${color}" d="${path}"/>`;
      }).join("");
    }

    const isDrawn = (place, value) =>
      isPositive(place, scales.x.log) && isPositive(value, scales.y.log);

    /* The path through the values of each row, with its gaps. */
    function path({ places }, ...lists) {
      let [text, pen] = ["", "M"];
      places.forEach((place, row) => {
        for (const values of lists) {
          const drawn = isDrawn(place, values[row]);
          if (drawn) text += `${pen}${pixelX(place).toFixed(1)},${pixelY(values[row]).toFixed(1)}`;
          if (drawn && pen === "M") text += "h0"; // a lone point is a dot
          pen = drawn ? "L" : "M";
        }
      });
      return text;
    }

    function drawCurve(curve) {
      const { role, places, mean, low, high, line, color, lost } = curve;
      if (role === "range") {
        const around = { places: [...places, ...places.toReversed()] };
        return `<path class="range" d="${path(around, [...high, ...low.toReversed()])}"/>`;
      }
      const lists = low === mean ? [mean] : [low, high];
      const every = Math.ceil(places.length / 24);
      const marks = places.map((place, row) => {
        const wanted = role === "eval" ? row % every === 0 : places.length === 1;
        if (!wanted || !isDrawn(place, mean[row])) return "";
        return marker(curve.number, pixelX(place), pixelY(mean[row]));
      });
      const crosses = lost.filter((row) => isPositive(places[row], scales.x.log))
        .map((row) => `M${pixelX(places[row]) - 4},4l8,8m0,-8l-8,8`);
      const dashes = curve.number >= 8 ? 'stroke-dasharray="6 4"' : "";
      return `<g stroke="${color}"><path class="raw ${role}" d="${path(curve, ...lists)}"/>
        <path class="${role}" ${dashes} d="${path(curve, line)}"/>
        <path style="fill:${color}" d="${marks.join("")}"/>
        <path d="${crosses.join("")}"/></g>`;
    }

    /* The legend: each curve or run with its values at a place, or else the last. */
    function fillTable(target = Infinity) {
      const rowOf = ({ places }) => nearest(places, target);
      const value = (curve) => {
        const row = rowOf(curve);
        const [low, high] = [curve.low[row], curve.high[row]].map((one) => format(one));
        if (curve.lost.includes(row)) return "not finite";
        return low === high ? low : `${low} – ${high}`;
      };
      const smoothed = (curve) => format(curve.line[rowOf(curve)]);
      const columns = data.alone
        ? [["value", "", value], ["smoothed", "train", smoothed]]
        : [["training", "train", value], ["smoothed", "train", smoothed], ["validation", "eval", value]];
      const cells = (group) => columns.map(([, role, read]) => {
        const chosen = group.filter((curve) => !role || curve.role === role).slice(0, 4);
        return `<td>${chosen.map(read).join(" / ")}</td>`;
      });
      const keys = [...new Set(curves.map(({ key }) => key))];
      const rows = keys.map((key) => {
        const group = curves.filter((curve) => curve.key === key);
        const { name, role, color, number, at } = group[0];
        const marked = group.some((curve) => curve.role === "eval") ? marker(number, 13, 6) : "";
        const places = Object.keys(data.x).map((x) => `<td>${format(at[x][rowOf(group[0])], 1)}</td>`);
        return `<tr class="${state.hidden[key] ? "off" : ""}" data-key="${escape(key)}"><td><button>
          <svg width="26" height="12" stroke="${color}"><path class="${role}" d="M1,6h24v1h-24"/>
          <path style="fill:${color}" d="${marked}"/></svg> ${escape(name)}</button></td>${cells(group).join("")}${places.join("")}</tr>`;
      });
      const titles = ["", ...columns.map(([title]) => title), ...Object.keys(data.x)];
      const head = `<tr>${titles.map((title) => `<th>${title}</th>`).join("")}</tr>`;
      table.innerHTML = rows.length ? head + rows.join("") : "";
      const lost = curves.some((curve) => curve.lost.length) && "×: not finite";
      const resumed = data.runs.some(({ resumes }) => resumes.step.length) && "dashed: resumed";
      find(".faint:last-child").textContent = [resumed, lost, HINT].filter(Boolean).join(" · ");
    }

    function showPoint(x, y) {
      let best = { distance: Infinity };
      for (const curve of visible()) {
        const row = nearest(curve.places, scales.x.value(x));
        const [place, value] = [curve.places[row], curve.line[row]];
        if (!isDrawn(place, value)) continue;
        const [left, top] = [pixelX(place), pixelY(value)];
        const distance = Math.hypot(x - left, y - top);
        if (distance < best.distance) best = { distance, place, value, left, top, color: curve.color };
      }
      const { place, value, left, top, color } = best;
      if (place === undefined) return;
      const beside = left > width / 2 ? `x="${left - 9}" text-anchor="end"` : `x="${left + 9}"`;
      find(".hover").innerHTML = `<path class="grid" d="M${left},0v${height}"/>
        <path style="fill:${color}" d="${marker(1, left, top, 4.5)}"/>
        <text class="point" ${beside} y="${Math.max(12, top - 9)}">${format(value)}</text>`;
      fillTable(place);
    }

    function listen() {
      let drag = null;
      const position = ({ clientX, clientY }) => {
        const box = picture.getBoundingClientRect();
        return [clientX - box.left - MARGIN.left, clientY - box.top - MARGIN.top];
      };
      const range = (scale, ...pixels) => pixels.sort((a, b) => a - b).map(scale.value);
      picture.addEventListener("pointerdown", (event) => {
        if (event.button || !scales.y) return;
        event.preventDefault();
        picture.setPointerCapture(event.pointerId);
        drag = { from: position(event), pan: event.shiftKey, ...scales };
      });
      picture.addEventListener("pointermove", (event) => {
        const [x, y] = position(event);
        if (!drag) {
          if (scales.y) showPoint(x, y);
          return;
        }
        const [across, down] = [x - drag.from[0], y - drag.from[1]];
        if (drag.pan) {
          state.zoom.x = range(drag.x, -across, width - across);
          if (state.zoom.y) state.zoom.y = range(drag.y, down, height + down);
          draw();
          return;
        }
        const tall = Math.abs(down) > TALL;
        find(".hover").innerHTML = `<rect x="${Math.min(x, drag.from[0])}" width="${Math.abs(across)}"
          y="${tall ? Math.min(y, drag.from[1]) : 0}" height="${tall ? Math.abs(down) : height}"/>`;
      });
      picture.addEventListener("pointerup", (event) => {
        const [x, y] = position(event);
        const { pan, from } = drag ?? { pan: true };
        drag = null;
        if (pan || Math.abs(x - from[0]) < 6) return;
        state.zoom.x = range(scales.x, x, from[0]);
        if (Math.abs(y - from[1]) > TALL) state.zoom.y = range(scales.y, height - y, height - from[1]);
        draw();
      });
      picture.addEventListener("dblclick", () => {
        state.zoom = {};
        draw();
      });
      picture.addEventListener("pointerleave", () => drag || draw());
      find(".controls").addEventListener("input", ({ target: { name, type, value, checked } }) => {
        state[name] = type === "checkbox" ? checked : value;
        if (name === "smoothing") state.smoothing = 1 - 10 ** (-value / 25); // 100 is 0.9999
        if (name === "y") state.log_y = null;
        if (name === "x" || name === "y") state.zoom[name] = null;
        draw();
      });
      table.addEventListener("click", ({ target }) => {
        const { key } = target.closest("tr").dataset;
        state.hidden[key] = !state.hidden[key];
        draw();
      });
      new ResizeObserver(draw).observe(host);
    }

    listen();
    draw();
  }

  const states = (window.minimindCharts ??= new Map());
  const hosts = [...document.querySelectorAll(".minimind-chart")];
  hosts.filter((host) => !host.drawn).forEach(start);
})();
