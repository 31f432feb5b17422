// What every page does: theme, times in the reader's zone, keys, live hints.
"use strict";
(() => {
  const root = document.documentElement;

  const isDark = () =>
    root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;

  document.querySelector("[data-theme-toggle]")?.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("vigil-theme", root.dataset.theme);
    document.dispatchEvent(new Event("themechange"));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    document.dispatchEvent(new Event("themechange")),
  );

  // Times: the server writes UTC, the reader sees local time.
  const full = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
  const short = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "numeric", minute: "2-digit" });
  const ago = (date) => {
    const seconds = Math.max(0, (Date.now() - date) / 1000);
    if (seconds < 60) return "just now";
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
    if (seconds < 36 * 3600) return `${Math.floor(seconds / 3600)} h ago`;
    return `${Math.floor(seconds / 86400)} d ago`;
  };
  const tellTimes = () => {
    for (const element of document.querySelectorAll("time[data-when], time[data-ago], time[data-short]")) {
      const date = new Date(element.dateTime);
      if (Number.isNaN(date.valueOf())) continue;
      element.title = full.format(date);
      const { dataset } = element;
      element.textContent = "ago" in dataset ? ago(date) : ("short" in dataset ? short : full).format(date);
    }
  };
  tellTimes();
  setInterval(tellTimes, 30000);
  document.addEventListener("htmx:afterSettle", tellTimes);

  // Open details and the marked row outlive a refresh.
  let opened = [];
  let marked = -1;
  const details = () => [...document.querySelectorAll("#live details")];
  const rows = () => [...document.querySelectorAll("[data-row]")];
  document.addEventListener("htmx:beforeSwap", () => {
    opened = details().map((one) => one.open);
  });
  document.addEventListener("htmx:afterSettle", () => {
    details().forEach((one, i) => (one.open = opened[i] ?? false));
    mark(marked);
  });

  // One stream a page: it says only that something changed.
  const address = document.body.dataset.live;
  const live = document.getElementById("live");
  if (address && live?.hasAttribute("hx-trigger")) {
    const refresh = () => htmx.trigger(live, "live");
    let source = null;
    let timer = 0;
    const listen = () => {
      source = new EventSource(address);
      source.addEventListener("changed", () => {
        clearTimeout(timer);
        timer = setTimeout(refresh, 150);
      });
      source.addEventListener("gone", () => {
        source.close();
        location.reload();
      });
      source.addEventListener("error", () => {
        if (source.readyState !== EventSource.CLOSED) return; // it tries again by itself
        // Refused: asking for the page itself leads to the login where that is why.
        setTimeout(refresh, 1000);
        setTimeout(listen, 15000);
      });
    };
    listen();
    addEventListener("pagehide", () => source.close());
  }

  // Keys of the worklist.
  const mark = (index) => {
    const all = rows();
    if (index < 0 || !all.length) return;
    marked = Math.min(index, all.length - 1);
    all.forEach((row, i) => row.classList.toggle("marked", i === marked));
  };
  const isTyping = (target) => target.closest?.("input, select, textarea, [data-viewer]");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const search = document.querySelector("[data-search]");
    if (event.key === "/" && search && !isTyping(event.target)) {
      search.focus();
      event.preventDefault();
    } else if (event.key === "Escape" && event.target === search) {
      search.blur();
    } else if (rows().length && !isTyping(event.target)) {
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        mark(marked < 0 ? 0 : Math.max(0, marked + (event.key === "ArrowDown" ? 1 : -1)));
        rows()[marked].scrollIntoView({ block: "nearest" });
        event.preventDefault();
      } else if (event.key === "Enter" && marked >= 0 && event.target === document.body) {
        rows()[marked].querySelector("a").click();
      }
    }
  });
  document.addEventListener("click", (event) => {
    const row = event.target.closest?.("[data-row]");
    if (row && !event.target.closest("a, button") && !String(getSelection())) {
      row.querySelector("a").click();
    }
  });

  document.addEventListener("submit", (event) => {
    const question = event.target.dataset?.confirm;
    if (question && !confirm(question)) event.preventDefault();
  });
})();
