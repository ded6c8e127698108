// Captures and graphs.
#include "fakecuda.h"

using namespace fake;

CUresult fake::refuse(Stream* s, CUresult why) {
  s->capture->spoilt = true;
  return why;
}

CUresult fake::may_wait() {
  CUresult result = OK;
  for (Stream* s : streams) {
    if (!s->capture || s->capture->mode == RELAXED) continue;
    if (s->capture->mode == GLOBAL || s->capture->owner == std::this_thread::get_id()) result = refuse(s, CAPTURE_UNSUPPORTED);
  }
  return result;
}

API cuStreamBeginCapture_v2(void* handle, int mode) {
  LOCK;
  Stream* s = stream(handle);
  if (mode < GLOBAL || mode > RELAXED) return INVALID_VALUE;
  if (s == streams[0]) return CAPTURE_UNSUPPORTED;
  if (s->capture) return ILLEGAL_STATE;
  s->capture.reset(new Capture{Mode(mode), std::this_thread::get_id(), {}});
  return OK;
}
API cuStreamEndCapture(void* handle, Graph** g) {
  LOCK;
  Stream* s = stream(handle);
  *g = nullptr;
  if (!s->capture) return ILLEGAL_STATE;
  if (s->capture->mode != RELAXED && s->capture->owner != std::this_thread::get_id()) return refuse(s, CAPTURE_WRONG_THREAD);
  const std::unique_ptr<Capture> done = std::move(s->capture);
  if (done->spoilt) return CAPTURE_INVALIDATED;
  *g = new Graph(std::move(done->graph));
  return OK;
}
API cuStreamIsCapturing(void* s, int* status) {
  LOCK;
  const Capture* c = stream(s)->capture.get();
  *status = !c ? 0 : c->spoilt ? 2 : 1;
  return OK;
}
API cuGraphInstantiateWithFlags(Graph** x, const Graph* g, unsigned long long) {
  LOCK;
  *x = new Graph(*g);
  return OK;
}
API cuGraphUpload(void*, void*) { return OK; }
API cuGraphLaunch(const Graph* x, void* s) {
  LOCK;
  for (const Op& op : *x)
    if (int e = enqueue(s, op)) return e;
  return OK;
}
// What was queued of it still runs.
API cuGraphExecDestroy(Graph* x) {
  LOCK;
  delete x;
  return OK;
}
API cuGraphDestroy(Graph* g) {
  LOCK;
  delete g;
  return OK;
}
