/* Turns the data of each new chart of a page into an interactive one, without libraries.
   A reader's choices in a chart with a key outlive its replacement. */
(() => {
  const HEIGHT = 340;
  const MARGIN = { left: 62, right: 12, top: 10, bottom: 42 };
  const LEAST_RATIO = 12; // of an axis' ends for ticks at equal ratios
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

  /* A scale from values, or a range that is zoomed, to pixels; null without values. A
     logarithmic one, if asked for, needs a value above 0. */
  function makeScale(values, length, asked, margin, most, zoom = null) {
    const log = asked && values.some((value) => value > 0);
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (!isPositive(value, log)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (low > high) return null;
    const [to, back] = log ? [Math.log10, (v) => 10 ** v] : [(v) => v, (v) => v];
    const pad = (to(high) - to(low)) * margin || (log ? 0.1 : Math.abs(high) * 0.1 || 1);
    const whole = [to(low) - pad, to(high) + pad];
    const [start, end] = zoom && isPositive(zoom[0], log) ? zoom.map(to) : whole;
    const place = (value) => ((to(value) - start) / (end - start)) * length;
    const value = (pixel) => back(start + (pixel / length) * (end - start));
    const lacks = asked && values.some((one) => one !== null && one <= 0);
    const note = lacks ? ` · ${log ? "only values" : "no value"} above 0` : "";
    return { log, place, value, note, ticks: tickValues(value(0), value(length), log, most) };
  }

  function smooth(mean, rows, weight) { // as `Curve.smooth` in curves.py
    let [total, mass] = [0, 0];
    return mean.map((value, at) => {
      const past = value === null ? 0 : weight ** rows[at];
      total = past * total + (1 - past) * value;
      mass = past * mass + (value === null ? 0 : 1 - past);
      return value === null ? null : total / mass;
    });
  }

  function nearest(places, target) { // the last of equals
    const nearer = (one, other) => Math.abs(one - target) <= Math.abs(other - target);
    return places.reduce((best, place, row) => (nearer(place, places[best]) ? row : best), 0);
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
    const state = states.get(data.key) ?? { ...data.choices, hidden: {}, zoom: null };
    if (data.key) states.set(data.key, state);
    if (!data.ys[state.y]) state.y = data.choices.y;
    const options = (labels) => Object.entries(labels).map(([name, { label = labels[name] }]) =>
      `<option value="${name}">${label.split(" (")[0]}</option>`).join("");
    host.replaceChildren(source);
    host.classList.toggle("several", !data.alone);
    host.insertAdjacentHTML("beforeend", `
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
      <svg height="${HEIGHT}"></svg><table></table><div class="faint"></div>`);
    const find = (selector) => host.querySelector(selector);
    const [picture, table] = [find("svg"), find("table")];
    let [curves, scales, width] = [[], {}, 0];
    const height = HEIGHT - MARGIN.top - MARGIN.bottom;
    const isLogY = () => state.log_y ?? data.ys[state.y].log;
    const pixelX = (value) => scales.x.place(value);
    const pixelY = (value) => height - scales.y.place(value);
    const visible = () => curves.filter(({ key }) => !state.hidden[key]);

    /* The curves of the chosen quantity with their places, smoothed, and their looks. */
    function prepare() {
      const all = data.ys[state.y].curves;
      const names = [...new Set(all.filter(({ role }) => role !== "range").map((c) => c.name))];
      return all.map((curve) => {
        const { smoothing, grids } = data.runs[curve.run];
        const at = grids[curve.role === "eval" ? "eval" : "train"];
        const own = curve.name === "validation" ? 1 : names.indexOf(curve.name);
        const number = data.alone ? own : curve.run;
        const color = number < 0 ? "currentColor" : `var(--c${number % 8})`;
        const weight = curve.role === "train" ? state.smoothing ?? smoothing : 0;
        const line = smooth(curve.mean, at.rows, weight);
        const key = data.alone ? curve.name : String(curve.run);
        const ends = { low: curve.mean, high: curve.mean };
        return { ...ends, ...curve, at, places: at[state.x], number, color, line, key };
      });
    }

    function fitScales() {
      const places = visible().flatMap((curve) => curve.places);
      const most = Math.ceil(width / 90);
      const x = makeScale(places, width, state.log_x, 0.015, most, state.zoom);
      const inside = visible().flatMap((curve) => curve.places.flatMap((place, row) => {
        const pixel = x.place(place);
        return pixel >= 0 && pixel <= width ? [curve.low[row], curve.high[row]] : [];
      }));
      return { x, y: makeScale(inside, height, isLogY(), 0.05, 6) };
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
      const across = scales.y.ticks.map((tick) => `
        <path class="grid" d="M0,${pixelY(tick)}h${width}"/>
        <text x="-8" y="${pixelY(tick) + 4}" text-anchor="end">${format(tick, 1, true)}</text>`);
      const along = scales.x.ticks.map((tick) => `
        <path class="axis" d="M${pixelX(tick)},${height}v4"/>
        <text x="${pixelX(tick)}" y="${height + 17}"
          text-anchor="middle">${format(tick, 1, true)}</text>`);
      const turned = `transform="translate(-50,${height / 2}) rotate(-90)" text-anchor="middle"`;
      return `${across.join("")}${along.join("")}<path class="axis" d="M0,${height}h${width}"/>
        <text ${center} y="${height + 36}">${data.x[state.x]}${scales.x.note}</text>
        <text ${turned}>${data.ys[state.y].label}${scales.y.note}</text>`;
    }

    function drawResumes() {
      const runs = data.runs.filter((_, run) => visible().some((curve) => curve.run === run));
      const places = runs.flatMap(({ resumes }) => resumes[state.x]).filter((x) => isDrawn(x, 1));
      const lines = places.map((place) => `M${pixelX(place)},0v${height}`);
      return `<path class="resume" d="${lines.join("")}"/>`;
    }

    const isDrawn = (place, value) =>
      isPositive(place, scales.x.log) && isPositive(value, scales.y.log);

    /* The path through the values of each row, to and fro, with its gaps. */
    function path({ places }, ...lists) {
      let [text, pen] = ["", "M"];
      places.forEach((place, row) => {
        for (const values of row % 2 ? lists : lists.toReversed()) {
          const drawn = isDrawn(place, values[row]);
          const start = pen === "M" ? "h0" : ""; // a lone point is a dot
          const point = drawn && [pixelX(place).toFixed(1), pixelY(values[row]).toFixed(1)];
          text += drawn ? `${pen}${point}${start}` : "";
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
      const crosses = lost.filter((row) => isDrawn(places[row], 1)).map((row) => (
        `M${pixelX(places[row]) - 4},4l8,8m0,-8l-8,8`));
      const dashes = curve.number >= 8 ? 'stroke-dasharray="6 4"' : "";
      return `<g stroke="${color}"><path class="raw ${role}" d="${path(curve, ...lists)}"/>
        <path class="${role}" ${dashes} d="${path(curve, line)}"/>
        <path style="fill:${color}" d="${marks.join("")}"/>
        <path d="${crosses.join("")}"/></g>`;
    }

    /* The legend: each curve or run with its values at a place, or else the last. */
    function fillTable(target = Number.MAX_VALUE) {
      const rowOf = ({ places }) => nearest(places, target);
      const value = (curve) => {
        const [low, high] = [curve.low, curve.high].map((values) => format(values[rowOf(curve)]));
        if (curve.lost.includes(rowOf(curve))) return "not finite";
        return low === high ? low : `${low} – ${high}`;
      };
      const smoothed = (curve) => format(curve.line[rowOf(curve)]);
      const average = ["train", smoothed];
      const all = data.alone
        ? { value: ["", value], smoothed: average }
        : { training: ["train", value], smoothed: average, validation: ["eval", value] };
      const rows = [...new Set(curves.map(({ key }) => key))].map((key) => {
        const group = curves.filter((curve) => curve.key === key);
        const { name, role, color, number, at } = group[0];
        const mark = group.some((curve) => curve.role === "eval") ? marker(number, 13, 6) : "";
        const values = Object.values(all).map(([wanted, read]) => {
          const chosen = group.filter((curve) => !wanted || curve.role === wanted);
          return chosen.slice(0, 4).map(read).join(" / ");
        });
        const places = Object.keys(data.x).map((x) => format(at[x][rowOf(group[0])], 1));
        return `<tr class="${state.hidden[key] ? "off" : ""}" data-key="${escape(key)}"><td><button>
          <svg width="26" height="12" stroke="${color}"><path class="${role}" d="M1,6h24v1h-24"/>
          <path style="fill:${color}" d="${mark}"/></svg> ${escape(name)}</button></td>
          ${[...values, ...places].map((text) => `<td>${text}</td>`).join("")}</tr>`;
      });
      const heads = ["", ...Object.keys(all), ...Object.keys(data.x)];
      table.innerHTML = heads.map((head) => `<th>${head}</th>`).join("") + rows.join("");
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
        const point = { distance, place, value, left, top, color: curve.color };
        if (distance < best.distance) best = point;
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
        drag = { from: position(event)[0], pan: event.shiftKey, scale: scales.x };
      });
      picture.addEventListener("pointermove", (event) => {
        const [x, y] = position(event);
        if (!event.buttons) drag = null; // a touch that became a scroll has no end
        if (!drag) {
          if (scales.y) showPoint(x, y);
          return;
        }
        if (drag.pan) {
          state.zoom = range(drag.scale, drag.from - x, drag.from - x + width);
          draw();
          return;
        }
        const size = `x="${Math.min(x, drag.from)}" width="${Math.abs(x - drag.from)}"`;
        find(".hover").innerHTML = `<rect ${size} height="${height}"/>`;
      });
      picture.addEventListener("pointerup", (event) => {
        const [x] = position(event);
        const { pan, from } = drag ?? { pan: true };
        drag = null;
        if (pan || Math.abs(x - from) < 6) return;
        state.zoom = range(scales.x, x, from);
        draw();
      });
      picture.addEventListener("dblclick", () => {
        state.zoom = null;
        draw();
      });
      picture.addEventListener("pointerleave", () => drag || draw());
      find(".controls").addEventListener("input", ({ target: { name, type, value, checked } }) => {
        state[name] = type === "checkbox" ? checked : value;
        if (name === "smoothing") state.smoothing = 1 - 10 ** (-value / 25); // 100 is 0.9999
        if (name === "y") state.log_y = null;
        if (name === "x") state.zoom = null;
        draw();
      });
      table.addEventListener("click", ({ target }) => {
        const { key } = target.closest("tr").dataset;
        if (key) state.hidden[key] = !state.hidden[key];
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
