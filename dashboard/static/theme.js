// Loaded before the page is drawn, so that a dark room stays dark.
"use strict";
(() => {
  const chosen = localStorage.getItem("vigil-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
