// The image stack: slices by wheel, keys, drag and track; heat map as a layer of its own.
"use strict";
(() => {
  const stage = document.querySelector("[data-viewer]");
  if (!stage) return;
  const data = JSON.parse(stage.dataset.viewer);
  const find = (name) => document.querySelector(`[data-${name}]`);
  const slice = find("slice");
  const cam = find("cam");
  const words = find("words");
  const track = find("track");
  const opacity = find("opacity");
  const camWords = find("cam-words");
  const profile = find("profile");
  const windows = [...document.querySelectorAll("[data-window]")];
  const jumps = [...document.querySelectorAll("[data-jump]")];
  const last = data.numbers.length - 1;
  const query = data.bundle ? `&bundle=${encodeURIComponent(data.bundle)}` : "";
  let at = data.start;
  let shownWindow = "display";
  let isCamOn = true;

  // Pictures live in this page's memory alone: nothing of a patient is left in the browser's cache.
  const pictures = new Map();
  const missed = new Set(); // tried again when looked at, never by reading ahead
  let loading = 0;
  const picture = (url) => {
    if (!pictures.has(url)) {
      loading += 1;
      const promise = fetch(url, { credentials: "same-origin" })
        .then(async (answer) => {
          if (answer.ok) return { url: URL.createObjectURL(await answer.blob()) };
          const isText = answer.headers.get("content-type")?.startsWith("text/plain");
          if (answer.status >= 500) missed.add(url);
          return { words: isText ? await answer.text() : "This image cannot be shown." };
        })
        .catch(() => {
          missed.add(url);
          return { words: "No connection." };
        })
        .finally(() => {
          loading -= 1;
        });
      pictures.set(url, promise);
    }
    return pictures.get(url);
  };
  const sliceUrl = (i) => `${data.base}/image/${i}.png?window=${shownWindow}${query}`;
  const camUrl = (k) => `${data.base}/heatmap/${k}.png?${query.slice(1)}`;

  const put = (image, found) => {
    if (found.url) {
      if (image.src !== found.url) image.src = found.url;
      image.hidden = false;
    } else {
      image.hidden = true;
    }
  };

  const show = async () => {
    const i = at;
    const name = shownWindow;
    const k = data.keys.findIndex((key) => key.image === i);
    const number = data.numbers[i] ?? i + 1;
    const position = data.positions[i];
    const word = data.word[0].toUpperCase() + data.word.slice(1);
    find("place").textContent =
      `${word} ${number} · ${i + 1} of ${last + 1}` +
      (position == null ? "" : ` · ${position.toFixed(1)} mm`);
    track.value = i;
    jumps.forEach((one) => one.classList.toggle("here", Number(one.dataset.jump) === i));
    [...(profile?.querySelectorAll("rect") ?? [])].forEach((bar, n) =>
      bar.classList.toggle("here", n === i),
    );
    const hasCam = k >= 0 && isCamOn && Number(opacity?.value ?? 0) > 0;
    camWords.hidden = !hasCam;
    if (!hasCam) cam.hidden = true;
    const timer = setTimeout(() => {
      words.textContent = "Loading…";
      words.hidden = false;
    }, 120);
    for (const url of missed) pictures.delete(url);
    missed.clear();
    const [found, heat] = await Promise.all([
      picture(sliceUrl(i)),
      hasCam ? picture(camUrl(k)) : null,
    ]);
    clearTimeout(timer);
    if (i !== at || name !== shownWindow) return;
    put(slice, found);
    words.hidden = Boolean(found.url);
    words.textContent = found.words ?? "";
    // A heat map without its slice says nothing, and looks as if it did.
    if (heat) put(cam, found.url ? heat : {});
    camWords.hidden = cam.hidden;
    stage.dataset.shown = String(i);
    if (found.url) preload();
  };

  const preload = () => {
    for (let step = 1; step <= last && loading < 3; step += 1) {
      for (const i of [at + step, at - step]) {
        if (i >= 0 && i <= last && !pictures.has(sliceUrl(i)) && loading < 3) {
          picture(sliceUrl(i)).then(preload);
        }
      }
    }
  };

  const go = (i) => {
    const next = Math.min(last, Math.max(0, i));
    if (next !== at) {
      at = next;
      show();
    }
  };
  const pick = (name) => {
    shownWindow = name;
    windows.forEach((one) => {
      const isIt = one.dataset.window === name;
      one.setAttribute("aria-pressed", String(isIt));
      if (isIt) find("window-name").textContent = one.title;
    });
    show();
  };
  const fade = () => {
    cam.style.opacity = opacity.value;
    show();
  };
  const nextKey = (step) => {
    const keys = data.keys.map((key) => key.image);
    if (!keys.length) return;
    const place = step > 0 ? keys.find((i) => i > at) : keys.findLast((i) => i < at);
    go(place ?? (step > 0 ? keys[0] : keys[keys.length - 1]));
  };

  const KEYS = {
    ArrowUp: () => go(at - 1),
    ArrowLeft: () => go(at - 1),
    ArrowDown: () => go(at + 1),
    ArrowRight: () => go(at + 1),
    PageUp: () => go(at - 5),
    PageDown: () => go(at + 5),
    Home: () => go(0),
    End: () => go(last),
    w: () => pick(windows[(windows.findIndex((o) => o.dataset.window === shownWindow) + 1) % windows.length].dataset.window),
    h: () => {
      isCamOn = !isCamOn;
      show();
    },
    k: () => nextKey(1),
    j: () => nextKey(-1),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inField = event.target.closest?.("input, select, textarea, button, a, summary");
    const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || (inField && event.key !== "k" && event.key !== "h" && event.key !== "w")) return;
    act();
    event.preventDefault();
  });

  let turned = 0;
  stage.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      // Trackpads send many small steps, wheels few large ones.
      turned += event.deltaMode === 1 ? event.deltaY * 40 : event.deltaY;
      const steps = Math.trunc(turned / 40);
      if (steps) {
        turned -= steps * 40;
        go(at + Math.max(-3, Math.min(3, steps)));
      }
    },
    { passive: false },
  );
  let dragged = null;
  stage.addEventListener("pointerdown", (event) => {
    dragged = { y: event.clientY, at };
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (dragged) go(dragged.at + Math.round((event.clientY - dragged.y) / 12));
  });
  for (const name of ["pointerup", "pointercancel"]) {
    stage.addEventListener(name, () => (dragged = null));
  }
  track.addEventListener("input", () => go(Number(track.value)));
  profile?.addEventListener("click", (event) => {
    const box = profile.getBoundingClientRect();
    go(Math.floor(((event.clientX - box.left) / box.width) * (last + 1)));
  });
  jumps.forEach((one) => one.addEventListener("click", () => go(Number(one.dataset.jump))));
  windows.forEach((one) => one.addEventListener("click", () => pick(one.dataset.window)));
  opacity?.addEventListener("input", fade);

  if (opacity) cam.style.opacity = opacity.value;
  pick("display");
})();
