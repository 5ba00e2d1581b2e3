// A page that is opened as a file may not start a worker, and the search of the site is one.
// There, a hidden frame takes the worker's place: it runs the same script and gets its messages.
class IframeWorker extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.append(frame)
    this.inside = frame.contentWindow
    this.inside.postMessage = data => {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      this.onmessage?.(event)
    }
    const script = frame.contentDocument.createElement("script")
    script.src = url
    this.ready = new Promise(resolve => { script.onload = resolve })
    frame.contentDocument.body.append(script)
  }

  postMessage(data) {
    this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
  }

  terminate() {
    this.inside.frameElement.remove()
  }
}

if (location.protocol === "file:") window.Worker = IframeWorker
