// Shows maps as surfaces: rays through a 3D texture, turned by dragging and zoomed by the wheel.
const VERTEX = `#version 300 es
void main() {
  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 4.0 - 1.0;
  gl_Position = vec4(corner, 0.0, 1.0);
}`;

// Coordinates: the map's box is from -1 to 1; the eye looks along -z, y is upwards.
const FRAGMENT = `#version 300 es
precision highp float;
precision highp sampler3D;
uniform sampler3D map;
uniform mat3 turn;        // from the map's axes to the eye's
uniform vec2 pixels;
uniform float zoom, level, cut, size;
out vec4 colour;

float density(vec3 p) { return texture(map, p * 0.5 + 0.5).r; }

vec3 slope(vec3 p) {
  float h = 3.0 / size;
  return vec3(density(p + vec3(h, 0, 0)) - density(p - vec3(h, 0, 0)),
              density(p + vec3(0, h, 0)) - density(p - vec3(0, h, 0)),
              density(p + vec3(0, 0, h)) - density(p - vec3(0, 0, h)));
}

void main() {
  vec2 at = (2.0 * gl_FragCoord.xy - pixels) / min(pixels.x, pixels.y) / zoom;
  mat3 back = transpose(turn);
  vec3 from = back * vec3(at, 2.0), along = back * vec3(0, 0, -1);
  vec3 a = (-1.0 - from) / along, b = (1.0 - from) / along;
  vec3 nearest = min(a, b), farthest = max(a, b);
  float start = max(max(nearest.x, nearest.y), nearest.z);
  float end = min(min(farthest.x, farthest.y), farthest.z);
  float plane = 0.27 + 3.46 * cut;                      // from the box's nearest corner to its farthest
  bool capped = start < plane && cut > 0.0;
  if (cut > 0.0) start = max(start, plane);
  colour = vec4(0.0);
  if (start >= end) return;
  float step = 1.2 / size, t = start, before = density(from + along * t);
  bool inside = before > level;
  vec3 normal = vec3(0, 0, 1), tint = vec3(0.47, 0.67, 0.84);
  if (inside) {
    if (capped) tint = mix(vec3(0.80, 0.66, 0.42), vec3(1.0, 0.92, 0.72), (before - level) / (1.0 - level));
  } else {
    bool hit = false;
    for (int i = 0; i < 2000 && t < end; i++) {
      t += step;
      float here = density(from + along * t);
      if (here > level) {
        float low = t - step, high = t;
        for (int k = 0; k < 6; k++) {
          float middle = 0.5 * (low + high);
          if (density(from + along * middle) > level) high = middle; else low = middle;
        }
        t = high;
        hit = true;
        break;
      }
    }
    if (!hit) return;
  }
  vec3 p = from + along * t;
  if (!(inside && capped)) normal = normalize(turn * -slope(p) + vec3(0, 0, 1e-6));
  float bright = 0.35 + 0.65 * max(dot(normal, normalize(vec3(-0.35, 0.5, 0.8))), 0.0);
  if (!(inside && capped)) {
    // Hollows are darker: density close above the surface takes the light away.
    vec3 up = transpose(turn) * normal;
    float shade = 0.0;
    for (int k = 1; k <= 3; k++) shade += smoothstep(0.6 * level, level, density(p + up * float(k) * 5.0 / size));
    bright *= 1.0 - 0.17 * shade;
    bright += 0.15 * pow(max(dot(normal, normalize(vec3(-0.18, 0.26, 0.95))), 0.0), 24.0);
  }
  bright *= 1.0 - 0.45 * clamp((t - 0.9) / 2.2, 0.0, 1.0);
  colour = vec4(min(tint * bright * 1.15, 1.0), 1.0);
}`;

function program(gl) {
  const whole = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const part = gl.createShader(kind);
    gl.shaderSource(part, text);
    gl.compileShader(part);
    gl.attachShader(whole, part);
  }
  gl.linkProgram(whole);
  return gl.getProgramParameter(whole, gl.LINK_STATUS) ? whole : null;
}

// Rotations are quaternions [w, x, y, z], so that many small turns stay a turn.
function product(p, q) {
  const [a, b, c, d] = p, [e, f, g, h] = q;
  const r = [a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g,
             a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e];
  const length = Math.hypot(...r);
  return r.map((value) => value / length);
}

function about(x, y, z, angle) {
  const s = Math.sin(angle / 2);
  return [Math.cos(angle / 2), x * s, y * s, z * s];
}

function columns([w, x, y, z]) {
  return new Float32Array([
    1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y),
    2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x),
    2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)]);
}

let scrolled = -Infinity;  // when the page was last scrolled by a wheel outside of a map
addEventListener("wheel", (event) => {
  if (!event.target.closest?.(".stage3d")) scrolled = event.timeStamp;
}, {capture: true, passive: true});

function show(figure) {
  const canvas = figure.querySelector("canvas");
  const gl = canvas.getContext("webgl2", {alpha: true, antialias: false, preserveDrawingBuffer: true});
  const drawn = gl && program(gl);
  if (!drawn) return;

  const size = Number(figure.dataset.size);
  const low = Number(figure.dataset.low), high = Number(figure.dataset.high);
  const text = atob(figure.querySelector("script").textContent.trim());
  gl.bindTexture(gl.TEXTURE_3D, gl.createTexture());
  gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
  gl.texImage3D(gl.TEXTURE_3D, 0, gl.R8, size, size, size, 0, gl.RED, gl.UNSIGNED_BYTE,
                Uint8Array.from(text, (letter) => letter.charCodeAt(0)));
  for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER])
    gl.texParameteri(gl.TEXTURE_3D, filter, gl.LINEAR);
  for (const edge of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T, gl.TEXTURE_WRAP_R])
    gl.texParameteri(gl.TEXTURE_3D, edge, gl.CLAMP_TO_EDGE);
  gl.useProgram(drawn);
  const place = (name) => gl.getUniformLocation(drawn, name);

  const [levelSlider, cutSlider] = ["level", "cut"].map((name) => figure.querySelector(`input.${name}`));
  const radians = Math.PI / 180;
  const first = {
    turn: product(about(1, 0, 0, figure.dataset.tilt * radians), about(0, 1, 0, figure.dataset.turn * radians)),
    zoom: 1,
    level: Math.round(1000 * (figure.dataset.level - low) / (high - low)),
  };
  let turn, zoom, asked = false, moving = false, settled;

  function draw() {
    asked = false;
    const sharp = moving ? 0.6 : 1;
    const side = Math.min(canvas.clientWidth * (window.devicePixelRatio || 1), 1100) * sharp;
    canvas.width = canvas.height = Math.max(Math.round(side), 1);
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.uniformMatrix3fv(place("turn"), false, columns(turn));
    gl.uniform2f(place("pixels"), canvas.width, canvas.height);
    gl.uniform1f(place("zoom"), zoom);
    gl.uniform1f(place("level"), levelSlider.value / 1000);
    gl.uniform1f(place("cut"), cutSlider.value / 1000);
    gl.uniform1f(place("size"), size);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }
  function ask() {
    if (!asked) requestAnimationFrame(draw);
    asked = true;
  }
  function move() {  // coarse while something moves, sharp when it stands still
    moving = true;
    clearTimeout(settled);
    settled = setTimeout(() => { moving = false; ask(); }, 180);
    const level = low + (high - low) * levelSlider.value / 1000;
    levelSlider.nextElementSibling.textContent = level.toPrecision(3);
    cutSlider.nextElementSibling.textContent = `${Math.round(cutSlider.value / 10)} %`;
    ask();
  }
  function rotate(right, down) {
    turn = product(product(about(0, 1, 0, right), about(1, 0, 0, down)), turn);
    move();
  }
  function scale(factor) {
    zoom = Math.min(Math.max(zoom * factor, 0.3), 12);
    move();
  }
  function reset() {
    ({turn, zoom} = first);
    levelSlider.value = first.level;
    cutSlider.value = 0;
    move();
  }

  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    if (fingers.size === 1) {
      const perPixel = Math.PI / canvas.clientWidth;
      rotate((now[0] - before[0]) * perPixel, (now[1] - before[1]) * perPixel);
    } else {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) + 1;
      scale(apart(now) / apart(before));
    }
    fingers.set(event.pointerId, now);
  });
  for (const end of ["pointerup", "pointercancel"])
    canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    if (event.timeStamp - scrolled < 300) {  // the page is being scrolled past the map
      scrolled = event.timeStamp;
      return;
    }
    event.preventDefault();
    scale(Math.exp(-0.0015 * event.deltaY * (event.deltaMode ? 20 : 1)));
  }, {passive: false});
  const keys = {
    ArrowLeft: () => rotate(-0.1, 0), ArrowRight: () => rotate(0.1, 0),
    ArrowUp: () => rotate(0, -0.1), ArrowDown: () => rotate(0, 0.1),
    "+": () => scale(1.15), "=": () => scale(1.15), "-": () => scale(1 / 1.15),
  };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const slider of [levelSlider, cutSlider]) slider.addEventListener("input", move);
  figure.querySelector("button").addEventListener("click", reset);
  canvas.addEventListener("dblclick", reset);
  canvas.addEventListener("webglcontextlost", () => swap(false));
  new ResizeObserver(ask).observe(canvas);

  function swap(live) {
    canvas.hidden = !live;
    figure.querySelector("img").hidden = live;
    for (const name of [".controls", ".how"]) figure.querySelector(name).hidden = !live;
    figure.querySelector(".still").hidden = live;
  }
  swap(true);
  reset();
}

for (const figure of document.querySelectorAll("figure.viewer")) show(figure);
