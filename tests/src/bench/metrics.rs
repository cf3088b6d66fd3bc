//! Reads etcd's request counters and a process's memory.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

/// Requests that etcd has received so far, by method.
pub(super) type Requests = BTreeMap<String, u64>;

/// Reads etcd's counters, in the network namespace of this thread.
pub(super) fn requests(endpoint: &str) -> Result<Requests> {
    let address = endpoint.strip_prefix("http://").context("etcd speaks TLS: its counters cannot be read")?;
    let read = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: etcd\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = read().with_context(|| format!("read {endpoint}/metrics"))?;
    let requests = parse(&answer);
    ensure!(!requests.is_empty(), "{endpoint}/metrics counts no requests");
    Ok(requests)
}

/// The messages received: one for each call, and one for each request on a stream.
fn parse(metrics: &str) -> Requests {
    let mut requests = Requests::new();
    for line in metrics.lines().filter(|line| line.starts_with("grpc_server_msg_received_total{")) {
        let method = line.split("grpc_method=\"").nth(1).and_then(|rest| rest.split('"').next());
        let count = line.rsplit(' ').next().and_then(|count| count.parse::<f64>().ok());
        if let (Some(method), Some(count)) = (method, count) {
            *requests.entry(method.to_owned()).or_default() += count as u64;
        }
    }
    requests
}

/// Difference of two readings.
pub(super) fn since(before: &Requests, after: &Requests) -> Requests {
    let count = |(method, count): (&String, &u64)| {
        let new = count.saturating_sub(before.get(method).copied().unwrap_or(0));
        (new > 0).then(|| (method.clone(), new))
    };
    after.iter().filter_map(count).collect()
}

/// Memory of a process in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Current size.
    pub(super) now: u64,
    /// Peak size.
    pub(super) peak: u64,
}

/// Reads a process's memory.
pub(super) fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}: has the agent ended?"))?;
    let read = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    let field = |name| read(name).with_context(|| format!("{path} has no {name}"));
    Ok(Memory { now: field("VmRSS:")?, peak: field("VmHWM:")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_messages_on_streams_are_counted() {
        let text = "# HELP grpc_server_msg_received_total x\n\
            grpc_server_msg_received_total{grpc_method=\"Range\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 7\n\
            grpc_server_msg_received_total{grpc_method=\"Watch\",grpc_service=\"etcdserverpb.Watch\",grpc_type=\"bidi_stream\"} 2\n\
            grpc_server_msg_sent_total{grpc_method=\"Watch\",grpc_service=\"x\",grpc_type=\"bidi_stream\"} 900\n";
        let after = parse(text);
        assert_eq!(after, Requests::from([("Range".to_owned(), 7), ("Watch".to_owned(), 2)]));
        let before = Requests::from([("Range".to_owned(), 4), ("Watch".to_owned(), 2)]);
        assert_eq!(since(&before, &after), Requests::from([("Range".to_owned(), 3)]));
    }

    #[test]
    fn this_process_has_memory() {
        let memory = memory(std::process::id()).unwrap();
        assert!(memory.now > 0 && memory.peak >= memory.now);
    }
}
