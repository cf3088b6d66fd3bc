//! The commands of an operator, through the real binary: what they list, refuse, remove and write, and what they never show.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use etcd_client::LeaseGrantOptions;
use overlay_tests::agent::binary;
use serde_json::Value;

use crate::{
    hosts::{NETWORK, Network, ip, subnet_key, value},
    security::{PASSWORD, USER, with_users},
};

/// What came of a command.
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.all()))
    }

    pub(crate) fn all(&self) -> String {
        format!("exit code {:?}\n{}{}", self.code, self.stdout, self.stderr)
    }

    /// Standard output of a command that was done.
    pub(crate) fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.all());
        self.stdout
    }

    /// The one line that says why it was refused.
    pub(crate) fn refused(self) -> String {
        assert_eq!(self.code, Some(1), "{}", self.all());
        let errors: Vec<_> = self.stderr.lines().filter(|line| !line.starts_with("warning:")).collect();
        assert!(errors.len() == 1 && errors[0].starts_with("error: "), "{}", self.all());
        errors[0].to_owned()
    }
}

/// Runs the agent's binary without any variable of this process's.
pub(crate) fn run(arguments: &[&str], variables: &[(&str, &str)], input: &str) -> Answer {
    let mut command = Command::new(binary().unwrap());
    command.args(arguments).env_clear().envs(variables.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that needs no input may have ended.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Answer { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// Runs it on the test's server.
pub(crate) fn on(network: &Network, arguments: &[&str]) -> Answer {
    run(arguments, &[("FLANNELD_ETCD_ENDPOINTS", &network.etcd.endpoint())], "")
}

pub(crate) fn on_directory(directory: &Path, arguments: &[&str]) -> Answer {
    run(arguments, &[("OVERLAY_AGENT_STORE", &format!("dir:{}", directory.display()))], "")
}

const VXLAN: &str = r#"{"PublicIP":"192.168.77.3","BackendType":"vxlan","BackendData":{"VNI":1}}"#;

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_listed_with_what_they_are_and_why_some_are_no_routes() {
    let mut network = Network::start().await;
    network.take(1, "10.5.1.0/24").await;
    network.put("10.5.2.0-24", value(2), 0).await;
    network.put("10.5.3.0-24", VXLAN, 0).await;
    network.put("10.5.4.0-24", r#"{"PublicIP":"0.0.0.0"}"#, 0).await;
    network.put("10.6.1.0-24", value(6), 0).await;
    network.put("junk\u{1b}[31m", "junk", 0).await;
    let list = on(&network, &["leases", "-o", "json"]).json();
    assert_eq!(list["network"], "10.5.0.0/16");
    let leases = list["leases"].as_array().unwrap();
    let column = |name: &str| leases.iter().map(|lease| lease[name].clone()).collect::<Vec<_>>();
    assert_eq!(
        column("key"),
        ["10.5.1.0-24", "10.5.2.0-24", "10.5.3.0-24", "10.5.4.0-24", "10.6.1.0-24", r"junk\x1b[31m"]
    );
    assert_eq!(
        column("state"),
        ["lease", "reservation", "not routed", "not routed", "not routed", "not routed"]
    );
    let left = leases[0]["expires_in_s"].as_u64().unwrap();
    assert!((86000..=86400).contains(&left), "{left}");
    assert_eq!(leases[1]["expires_in_s"], Value::Null);
    assert_eq!(
        (&leases[1]["subnet"], &leases[1]["public_ip"]),
        (&"10.5.2.0/24".into(), &"192.168.77.2".into())
    );
    assert_eq!((&leases[2]["backend_type"], &leases[1]["backend_type"]), (&"vxlan".into(), &Value::Null));
    for (lease, words) in leases[2..].iter().zip(["vxlan", "0.0.0.0", "10.5.0.0/16", "not a subnet"]) {
        assert!(lease["reason"].as_str().unwrap().contains(words), "{lease}");
    }

    let text = on(&network, &["leases"]).done();
    assert!(!text.contains('\u{1b}'), "{text}");
    for words in [
        ["10.5.1.0/24", "192.168.77.1", "h", " lease"],
        ["10.5.2.0/24", "192.168.77.2", "never", "reservation"],
        ["10.5.3.0/24", "192.168.77.3", "never", "not routed: "],
    ] {
        let line = text.lines().find(|line| line.contains(words[0])).unwrap();
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_listed_without_a_config_too() {
    let mut network = Network::start().await;
    network.put("10.6.1.0-24", value(6), 0).await;
    for config in [None, Some("{")] {
        network.raw.delete(format!("{}/config", crate::hosts::PREFIX), None).await.unwrap();
        if let Some(config) = config {
            network.raw.put(format!("{}/config", crate::hosts::PREFIX), config, None).await.unwrap();
        }
        let answer = on(&network, &["leases", "-o", "json"]);
        assert!(answer.stderr.starts_with("warning: "), "{}", answer.all());
        assert_eq!(answer.json()["leases"][0]["state"], "reservation");
        assert!(answer.json()["config_problem"].is_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_living_hosts_lease_is_released_only_by_force() {
    let mut network = Network::start().await;
    let held = network.take(1, "10.5.1.0/24").await;
    let error = on(&network, &["lease", "release", "10.5.1.0/24"]).refused();
    for words in ["192.168.77.1", "alive", "--force"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(network.get("10.5.1.0-24").await.is_some());
    let text = on(&network, &["lease", "release", "10.5.1.0/24", "--force"]).done();
    assert!(
        text.contains("released 10.5.1.0/24, a lease of 192.168.77.1") && text.contains("alive"),
        "{text}"
    );
    assert!(network.get("10.5.1.0-24").await.is_none());

    // Its host is gone: nothing is in the way.
    let subnet = held.subnet.to_string();
    let lease = network.raw.lease_grant(1000, None::<LeaseGrantOptions>).await.unwrap().id();
    network.put("10.5.9.0-24", value(9), lease).await;
    let released = on(&network, &["lease", "release", "10.5.9.0/24", "-o", "json"]).json();
    assert_eq!((&released["public_ip"], &released["state"]), (&ip(9).to_string().into(), &"lease".into()));
    assert_eq!((&released["owner"], &released["key"]), (&Value::Null, &"10.5.9.0-24".into()));
    let error = on(&network, &["lease", "release", &subnet]).refused();
    assert!(error.contains("no record of 10.5.1.0/24") && error.contains("overlay-agent leases"), "{error}");
    assert_eq!(on(&network, &["lease", "release", "10.5.1.7/24"]).code, Some(2), "host bits are wrong usage");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_wrote_is_released_only_by_force() {
    let mut network = Network::start().await;
    network.put("10.5.2.0-24", value(2), 0).await;
    network.put("junk", "junk", 0).await;
    network.put("10.5.3.0-24", value(3), 0).await;
    network.put("10.5.3.0-24&2001:cafe:42:1::-64", value(3), 0).await;
    for (target, words) in [("10.5.2.0/24", "reservation for 192.168.77.2"), ("junk", "reservation")] {
        let error = on(&network, &["lease", "release", target]).refused();
        assert!(error.contains(words) && error.contains("--force"), "{error}");
        let text = on(&network, &["lease", "release", "-force", target]).done();
        assert!(text.contains(words), "{text}");
    }
    let error = on(&network, &["lease", "release", "--force", "10.5.3.0/24"]).refused();
    assert!(error.contains("10.5.3.0-24 and 10.5.3.0-24&2001:cafe:42:1::-64"), "{error}");
    on(&network, &["lease", "release", "--force", "10.5.3.0-24"]).done();
    let left: Vec<_> = network.records().await.iter().map(|kv| kv.key_str().unwrap().to_owned()).collect();
    assert_eq!(left, [subnet_key("10.5.3.0-24&2001:cafe:42:1::-64")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_is_shown_with_its_defaults() {
    let mut network = Network::of(r#"{"network":"10.5.0.0/16","backend":{"TYPE":"UDP"}}"#).await;
    let text = on(&network, &["config", "show"]).done();
    for words in [r#"{"network":"10.5.0.0/16","backend":{"TYPE":"UDP"}}"#, "SubnetMax", "10.5.255.0", "8285"]
    {
        assert!(text.contains(words), "{text}");
    }
    let json = on(&network, &["config", "show", "-o", "json"]).json();
    assert_eq!((&json["usable"], &json["effective"]["SubnetLen"]), (&true.into(), &24.into()));
    assert_eq!(json["effective"]["Backend"]["Port"], 8285);

    let key = format!("{}/config", crate::hosts::PREFIX);
    network.raw.put(key.clone(), r#"{"Network":"10.5.0.0/16","SubnetLen":99}"#, None).await.unwrap();
    let answer = on(&network, &["config", "show"]);
    assert!(answer.stdout.contains("99"), "it is shown all the same: {}", answer.all());
    assert!(answer.refused().contains("SubnetLen"));
    assert!(on(&network, &["config", "check"]).refused().contains("SubnetLen"));
    network.raw.delete(key, None).await.unwrap();
    for command in ["show", "check"] {
        let error = on(&network, &["config", command]).refused();
        assert!(error.contains("/coreos.com/network/config") && error.contains("config set"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_is_checked_before_it_gets_into_the_store() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("net.json");
    std::fs::write(&file, NETWORK).unwrap();
    let file = file.to_str().unwrap();
    assert!(run(&["config", "check", file], &[], "").done().contains("can be used"));
    assert!(run(&["config", "check", "-"], &[], NETWORK).done().contains("10.5.0.0/16"));
    for (input, words) in [
        (r#"{"Network":"10.5.0.0/16""#, "not a JSON object"),
        (r#"{"NETWORK":"10.5.0.0/16","subnetlen":17}"#, "SubnetLen"),
        (r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#, "vxlan"),
        (r#"{"Network":"10.5.0.0/16","EnableIPv4":false}"#, "carries only IPv4"),
        (r#"{"Network":"127.5.0.0/16"}"#, "loopback"),
        (r#"{"Network":"010.5.0.0/16"}"#, "leading zeros"),
        (r#"{"Network":"10.5.0.0/16","Backend":{}}"#, "Backend has no Type"),
        (r#"{"Network":"10.5.0.0/16","IPv6Network":"junk"}"#, "IPv6Network"),
        ("/does/not/exist", "/does/not/exist"),
    ] {
        let error = run(&["config", "check", input], &[], "").refused();
        assert!(error.contains(words), "{error}");
    }
    let misspelt = r#"{"Network":"10.5.0.0/16","SubnetLenght":26}"#;
    let answer = run(&["config", "check", misspelt, "-o", "json"], &[], "");
    assert!(
        answer.stderr.contains("warning: ") && answer.stderr.contains("SubnetLenght"),
        "{}",
        answer.all()
    );
    assert_eq!(
        (&answer.json()["usable"], &answer.json()["unknown_keys"][0]),
        (&true.into(), &"SubnetLenght".into())
    );
    let dual_stack = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    let answer = run(&["config", "check", dual_stack, "-o", "json"], &[], "");
    assert!(answer.stderr.contains("warning: EnableIPv6"), "{}", answer.all());
    assert!(answer.json()["warnings"][0].as_str().unwrap().contains("only IPv4"), "{}", answer.all());
    let answer = run(&["config", "check", "{}", "-o", "json"], &[], "");
    assert_eq!((answer.code, &answer.json()["usable"]), (Some(1), &false.into()));
    assert!(answer.json()["problem"].as_str().unwrap().contains("Network"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_that_would_cost_hosts_their_subnets_is_written_only_by_force() {
    let mut network = Network::start().await;
    let key = format!("{}/config", crate::hosts::PREFIX);
    network.take(1, "10.5.1.0/24").await;
    network.take(2, "10.5.200.0/24").await;
    network.put("10.5.201.0-24", value(3), 0).await;
    let stored = async |network: &mut Network| {
        let kv = network.raw.get(key.clone(), None).await.unwrap().take_kvs().pop().unwrap();
        kv.value_str().unwrap().to_owned()
    };
    // No host loses its subnet by another port, but a host that restarts loses the others.
    let port = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":4789}}"#;
    let error = on(&network, &["config", "set", port]).refused();
    for words in
        ["8285 -> 4789", "2, the first is 10.5.1.0/24 of 192.168.77.1", "--force", "restart all agents"]
    {
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(stored(&mut network).await, NETWORK, "nothing refused was written");
    let text = on(&network, &["config", "set", port, "--force"]).done();
    assert!(text.contains("8285 -> 4789") && !text.contains("SubnetLen"), "{text}");
    assert!(text.contains("Restart the agents"), "{text}");
    assert_eq!(stored(&mut network).await, port);
    let narrower =
        r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.210.0","Backend":{"Type":"udp","Port":4789}}"#;
    on(&network, &["config", "set", narrower]).done();
    for (smaller, count) in
        [(r#"{"network":"10.5.0.0/17"}"#, "2"), (r#"{"Network":"10.5.0.0/16","SubnetLen":26}"#, "2")]
    {
        let error = on(&network, &["config", "set", smaller]).refused();
        assert!(error.contains(&format!("{count} of the leases")) && error.contains("--force"), "{error}");
        assert!(
            error.contains("10.5.200.0/24 of 192.168.77.2") || error.contains("10.5.1.0/24 of 192.168.77.1"),
            "{error}"
        );
    }
    assert!(on(&network, &["config", "set", "{"]).refused().contains("JSON"));
    assert_eq!(stored(&mut network).await, narrower, "nothing refused was written");
    let smaller = r#"{"network":"10.5.0.0/17"}"#;
    let written = on(&network, &["config", "set", "--force", "-o", "json", smaller]).json();
    assert_eq!((&written["misfits"], &written["before"]), (&2.into(), &narrower.into()));
    assert_eq!((&written["restarts"], stored(&mut network).await.as_str()), (&2.into(), smaller));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_is_no_host_that_a_new_config_cuts_off() {
    let mut network = Network::start().await;
    network.put("10.5.2.0-24", value(2), 0).await;
    let port = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":4789}}"#;
    on(&network, &["config", "set", port]).done();
    // A config that agents cannot use may have hosts of another backend.
    let key = format!("{}/config", crate::hosts::PREFIX);
    let vxlan = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
    network.raw.put(key.clone(), vxlan, None).await.unwrap();
    on(&network, &["config", "set", NETWORK]).done();
    network.raw.put(key, vxlan, None).await.unwrap();
    let lease = network.raw.lease_grant(1000, None::<LeaseGrantOptions>).await.unwrap().id();
    network.put("10.5.3.0-24", VXLAN, lease).await;
    let error = on(&network, &["config", "set", NETWORK]).refused();
    assert!(
        error.contains("10.5.3.0/24 of 192.168.77.3") && error.contains("cannot use the stored"),
        "{error}"
    );
}

#[test]
fn a_directory_is_read_and_written_in_the_same_way() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("store");
    assert!(on_directory(&directory, &["leases"]).refused().contains("no store"));
    on_directory(&directory, &["config", "set", NETWORK]).done();
    assert!(on_directory(&directory, &["config", "show"]).done().contains(NETWORK));
    assert_eq!(on_directory(&directory, &["leases"]).done().trim(), "no leases");
    let subnets = directory.join("subnets");
    std::fs::create_dir(&subnets).unwrap();
    std::fs::write(subnets.join("10.5.1.0-24"), value(1)).unwrap();
    std::fs::write(subnets.join("10.5.3.0-24"), VXLAN).unwrap();
    let list = on_directory(&directory, &["leases", "-o", "json"]).json();
    assert_eq!(
        (&list["leases"][0]["state"], &list["leases"][0]["expires_in_s"]),
        (&"lease".into(), &Value::Null)
    );
    assert_eq!(list["leases"][1]["state"], "not routed");
    let error = on_directory(&directory, &["config", "set", r#"{"Network":"10.6.0.0/16"}"#]).refused();
    assert!(error.contains("1 of the leases") && error.contains("10.5.1.0/24"), "{error}");
    let text = on_directory(&directory, &["lease", "release", "10.5.1.0/24"]).done();
    assert!(text.contains("192.168.77.1"), "{text}");
    assert!(!subnets.join("10.5.1.0-24").exists() && subnets.join("10.5.3.0-24").exists());
    assert!(on_directory(&directory, &["lease", "release", "10.5.1.0/24"]).refused().contains("no record"));
    assert!(on_directory(&directory, &["leases", "-etcd-prefix=/x"]).refused().contains("--etcd-prefix"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_used_and_never_shown() {
    let mut network = Network::start().await;
    with_users(&mut network).await;
    let endpoint = network.etcd.endpoint();
    let ask = |arguments: &[&str], password: &str| {
        let variables = [
            ("FLANNELD_ETCD_ENDPOINTS", endpoint.as_str()),
            ("FLANNELD_ETCD_USERNAME", USER),
            ("FLANNELD_ETCD_PASSWORD", password),
        ];
        let answer = run(arguments, &variables, "");
        assert!(!answer.all().contains(password), "{}", answer.all());
        answer
    };
    assert!(ask(&["config", "show"], PASSWORD).done().contains("10.5.0.0/16"));
    for arguments in [
        &["leases"][..],
        &["lease", "release", "10.5.1.0/24"],
        &["config", "show"],
        &["config", "set", NETWORK],
        &["config", "check"],
    ] {
        ask(&[arguments, &["--help"]].concat(), PASSWORD).done();
        let error = ask(arguments, "wrong-password").refused();
        assert!(error.contains("--etcd-username"), "{error}");
    }
    ask(&["leases", "--etcd-keyfile=/x"], PASSWORD);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_etcd_every_command_ends_with_one_line() {
    let mut network = Network::start().await;
    network.etcd.kill();
    for arguments in [
        &["leases"][..],
        &["lease", "release", "10.5.1.0/24"],
        &["config", "show"],
        &["config", "set", NETWORK],
        &["config", "check"],
    ] {
        let error = on(&network, arguments).refused();
        assert!(error.contains(&network.etcd.endpoint()) && error.contains("--etcd-endpoints"), "{error}");
    }
}
