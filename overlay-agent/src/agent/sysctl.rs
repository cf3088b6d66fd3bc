//! Checks the kernel's switches for forwarding, without which packets of containers do not cross this host.

use std::fs;

use crate::{
    netlink::{Netlink, device_name},
    route::Subnet,
};

/// Settings of IPv4 in this network namespace.
const SETTINGS: &str = "/proc/sys/net/ipv4";

/// Why packets do not pass between the overlay device and the containers of `subnet`, with the remedy. The kernel asks the device
/// on which a packet arrives.
pub(super) async fn forwarding_problem(netlink: &Netlink, overlay: &str, subnet: Subnet) -> Option<String> {
    // One of the kernel's listings may fail under memory pressure; the next check is a second away.
    let addresses = netlink.addresses().await.unwrap_or_default();
    let inside = addresses.iter().filter(|(_, address)| subnet.prefix().contains(&address.addr()));
    let mut devices: Vec<_> = inside.filter_map(|(index, _)| device_name(*index).ok()).collect();
    devices.sort();
    devices.dedup();
    problem(overlay, &devices, |name| fs::read_to_string(format!("{SETTINGS}/{name}")).ok())
}

/// As [`forwarding_problem`], of containers behind `devices`, where `read` returns the value of a setting.
fn problem(overlay: &str, devices: &[String], read: impl Fn(&str) -> Option<String>) -> Option<String> {
    let is_off = |name: &str| read(name).is_some_and(|value| value.trim() == "0");
    let device_is_off = |device: &str| is_off(&format!("conf/{device}/forwarding"));
    if is_off("ip_forward") {
        return Some(
            "net.ipv4.ip_forward is 0: this host's own packets cross the overlay, those of its containers do not (sysctl -w \
             net.ipv4.ip_forward=1)"
                .to_owned(),
        );
    }
    if device_is_off(overlay) {
        return Some(format!(
            "net.ipv4.conf.{overlay}.forwarding is 0: packets of peers reach this host and not its containers (sysctl -w {})",
            setting(overlay)
        ));
    }
    let device = devices.iter().find(|device| *device != overlay && device_is_off(device))?;
    Some(format!(
        "net.ipv4.conf.{device}.forwarding is 0: packets of the containers behind {device} do not reach the overlay (sysctl -w {})",
        setting(device)
    ))
}

/// What sysctl takes: a dot in a device's name, as of a VLAN, is a slash there.
fn setting(device: &str) -> String {
    format!("net.ipv4.conf.{}.forwarding=1", device.replace('.', "/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_switch_that_is_off_is_named_with_the_remedy() {
        let devices = ["cni0".to_owned(), "eth0.5".to_owned(), "ovl0".to_owned()];
        let with = |off: &[&str]| {
            problem("ovl0", &devices, |name| {
                // The kernel has no file for a device that is gone.
                (!name.contains("cni0")).then(|| if off.contains(&name) { "0\n" } else { "1\n" }.to_owned())
            })
        };
        assert_eq!(with(&[]), None);
        assert!(with(&["conf/cni0/forwarding"]).is_none());
        let all = ["ip_forward", "conf/ovl0/forwarding", "conf/eth0.5/forwarding"];
        for (off, remedy) in [
            (&all[..], "sysctl -w net.ipv4.ip_forward=1"),
            (&all[1..], "sysctl -w net.ipv4.conf.ovl0.forwarding=1"),
            (&all[2..], "sysctl -w net.ipv4.conf.eth0/5.forwarding=1"),
        ] {
            let text = with(off).unwrap();
            assert!(text.contains(remedy), "{text}");
        }
    }
}
