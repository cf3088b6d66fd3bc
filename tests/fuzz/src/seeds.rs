//! Inputs to begin with: the golden packets and lease records, configs in flannel's forms, DNS messages.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{Target, dns, scenario};

/// A file of golden packets, as far as it is needed here.
#[derive(Deserialize)]
struct Packets {
    vectors: Vec<GoldenPacket>,
}

#[derive(Deserialize)]
struct GoldenPacket {
    packet: String,
    #[serde(default)]
    gso_size: u16,
}

#[derive(Deserialize)]
struct GoldenLease {
    key: String,
    value: String,
}

const CONFIGS: [&str; 8] = [
    r#"{"Network":"10.244.0.0/16"}"#,
    r#"{"Network":"10.244.7.1/16","SubnetLen":26,"SubnetMin":"10.244.1.0","SubnetMax":"10.244.9.192"}"#,
    r#"{"network":"10.0.0.0/8","SubnetLen":0,"SubnetMin":"0.0.0.0","Backend":{"Type":"UDP","Port":8285}}"#,
    r#"{"EnableIPv4":true,"EnableIPv6":false,"EnableNFTables":false,"Network":"10.1.0.0/28"}"#,
    r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":64}"#,
    r#"{"Network":"10.1.0.0/16","IPv6SubnetMin":"fd00::","IPv6SubnetMax":"fd00:0:0:f::"}"#,
    r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":1}}"#,
    r#"{"EnableIPv4":false,"Network":null,"Network":"10.1.0.0/30","Backend":{}}"#,
];

/// Writes the seeds of a target as files of `directory`, and creates it.
pub fn write(target: Target, directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for (number, seed) in all(target)?.iter().enumerate() {
        fs::write(directory.join(format!("seed-{number:04}")), seed)?;
    }
    Ok(())
}

/// The seeds of a target. Fails when the golden vectors cannot be read.
pub fn all(target: Target) -> io::Result<Vec<Vec<u8>>> {
    let seeds = match target {
        Target::Egress => {
            packets("egress.json")?.map(|(gso_size, packet)| scenario(gso_size, packet)).collect()
        }
        Target::Ingress => packets("ingress.json")?.map(|(_, frame)| scenario(0, frame)).collect(),
        // Packets that leave, and the payloads of frames that arrive.
        Target::Shell => {
            let payloads =
                packets("ingress.json")?.filter_map(|(_, frame)| frame.get(42..).map(<[u8]>::to_vec));
            packets("egress.json")?
                .map(|(_, packet)| packet)
                .chain(payloads)
                .map(|packet| scenario(0, packet))
                .collect()
        }
        Target::Fragments => {
            let may_be_cut = |mut packet: Vec<u8>| {
                packet.iter_mut().skip(6).take(1).for_each(|flags| *flags &= !0x40);
                [&28u16.to_be_bytes()[..], &packet].concat()
            };
            packets("egress.json")?.map(|(_, packet)| may_be_cut(packet)).collect()
        }
        // Inner packets, and outer ones: what is behind the Ethernet header of a frame.
        Target::Icmp => {
            let outer = packets("ingress.json")?.filter_map(|(_, frame)| frame.get(14..).map(<[u8]>::to_vec));
            let inner = packets("egress.json")?.map(|(_, packet)| packet);
            inner.chain(outer).map(|packet| [&[0, 5, 120][..], &packet].concat()).collect()
        }
        Target::Lease => {
            let leases: Vec<GoldenLease> = read("leases.json")?;
            leases.iter().map(|lease| format!("{}\n{}", lease.key, lease.value).into_bytes()).collect()
        }
        Target::Config => CONFIGS.map(|config| config.as_bytes().to_vec()).into(),
        Target::DnsAnswer => dns::queries(),
        Target::DnsResponse => dns::responses(),
        Target::DnsCache => dns::steps(),
    };
    Ok(seeds)
}

/// The packet in the golden packets' own scenario.
fn scenario(gso_size: u16, packet: Vec<u8>) -> Vec<u8> {
    let mut input = vec![0; scenario::LEN];
    input[scenario::GSO_SIZE..][..2].copy_from_slice(&gso_size.to_be_bytes());
    input.extend(packet);
    input
}

/// The golden packets of a file with the payload of their segments.
fn packets(name: &str) -> io::Result<impl Iterator<Item = (u16, Vec<u8>)>> {
    let file: Packets = read(name)?;
    let bytes = |hex: &str| -> Option<Vec<u8>> {
        let digits = (0..hex.len()).step_by(2).map(|at| hex.get(at..at + 2));
        digits.map(|digits| u8::from_str_radix(digits?, 16).ok()).collect()
    };
    let packets: Option<Vec<_>> =
        file.vectors.iter().map(|vector| Some((vector.gso_size, bytes(&vector.packet)?))).collect();
    Ok(packets.ok_or_else(|| io::Error::other(format!("{name}: not hexadecimal")))?.into_iter())
}

fn read<T: for<'de> Deserialize<'de>>(name: &str) -> io::Result<T> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vectors").join(name);
    let text = fs::read_to_string(&path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    Ok(serde_json::from_str(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_seeds_and_all_of_them_pass() {
        for target in Target::ALL {
            let seeds = all(*target).unwrap();
            assert!(seeds.len() >= 8, "{target:?}");
            seeds.iter().for_each(|seed| target.check(seed));
        }
    }
}
