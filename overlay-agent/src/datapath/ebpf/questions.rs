//! Answers the programs' questions about tracked connections: may their packets bypass connection tracking?

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData, RingBuf};
use overlay_ebpf::flow::{FlowKey, Question, Released};
use tokio::{io::unix::AsyncFd, task::JoinHandle};
use tracing::{debug, warn};

use crate::conntrack::Conntrack;

// aya moves map keys and values as plain bytes.
type FlowBytes = [u8; size_of::<FlowKey>()];
type ReleasedBytes = [u8; size_of::<Released>()];

/// The map of connections of which connection tracking need not see all packets.
pub(super) type ReleasedMap = HashMap<MapData, FlowBytes, ReleasedBytes>;

/// A task that answers. Dropped, it ends; connections that it has answered for keep their answers.
#[derive(Debug)]
pub(super) struct Answering(JoinHandle<()>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts to answer, in a task of the current tokio runtime.
/// Fails when the kernel refuses a netlink socket.
pub(super) fn answer(questions: RingBuf<MapData>, mut released: ReleasedMap) -> Result<Answering> {
    let mut conntrack = Conntrack::open()?;
    #[expect(
        deprecated,
        reason = "its replacement is unsafe code; a ring buffer keeps its descriptor as long as it lives"
    )]
    let mut questions = AsyncFd::new(questions).context("wait for questions of the eBPF programs")?;
    Ok(Answering(tokio::spawn(async move {
        loop {
            let mut ready = match questions.readable_mut().await {
                Ok(ready) => ready,
                Err(error) => return warn!("no more tracked flows skip the host's stack: {error}"),
            };
            while let Some(item) = ready.get_inner_mut().next() {
                let question = bytemuck::try_pod_read_unaligned(&item);
                drop(item);
                if let Ok(question) = question
                    && let Err(error) = release(&mut conntrack, &mut released, &question)
                {
                    // The flow takes the host's stack, as any other does at first.
                    debug!("a tracked flow does not skip the host's stack: {error:#}");
                }
            }
            ready.clear_ready();
        }
    })))
}

fn release(conntrack: &mut Conntrack, map: &mut ReleasedMap, question: &Question) -> Result<()> {
    let flow = &question.flow;
    if !conntrack.release(flow)? {
        return Ok(());
    }
    let released = Released { connection: question.connection, since: question.time };
    let (flow, released) =
        (bytemuck::cast::<_, FlowBytes>(*flow), bytemuck::cast::<_, ReleasedBytes>(released));
    map.insert(flow, released, 0).context("write the map RELEASED")
}
