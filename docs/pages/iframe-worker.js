// Browsers refuse web workers to pages opened from disk, and the search runs in one. This runs the
// worker's script in a hidden frame instead, so that the search works without a server. (The offline
// plugin of mkdocs-material would load a library for this from the network.)
if (location.protocol === "file:") {
  // the search's worker asks its parent for this name and then loads its scripts beside itself
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.element = document.createElement("iframe");
      this.element.hidden = true;
      document.body.appendChild(this.element);

      const frame = this.element.contentWindow;
      frame.document.open();
      frame.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      frame.importScripts = async (...urls) => {
        for (const each of urls) await this.load(each);
      };
      frame.document.write("<html><body></body></html>");
      frame.document.close();

      this.load(url).then(() => {
        const early = this.waiting;
        this.waiting = null;
        early.forEach((data) => this.postMessage(data));
      });
    }

    load(url) {
      const inside = this.element.contentWindow.document;
      return new Promise((done, failed) => {
        const script = inside.createElement("script");
        script.src = new URL(url, location.href);
        script.onload = done;
        script.onerror = failed;
        inside.body.appendChild(script);
      });
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.element.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.element.remove();
    }
  };
}
