// Search in a site that is opened as files: a browser starts no worker there, so its script runs in a
// hidden frame, and the two pass messages on. With a server nothing is replaced.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = frame.contentDocument.createElement("script");
      this.waiting = [];
      script.onload = () => {
        for (const data of this.waiting.splice(0)) this.pass(data);
        this.waiting = null;
      };
      script.src = url;
      frame.contentDocument.body.append(script);
    }
    pass(data) {
      this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }));
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.pass(data);
    }
  };
}
