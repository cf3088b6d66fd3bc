//! A CA, the certificates that it signs, and servers with them.

use std::path::{Path, PathBuf};

use overlay_agent::store::etcd::EtcdOptions;
use overlay_tests::etcd::{Etcd, ServerTls};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256,
    SignatureAlgorithm, SigningKey as _,
};
use tempfile::TempDir;

use crate::hosts::PREFIX;

/// Files of a certificate and its key.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

/// A CA and what it signs, as files.
pub(crate) struct Authority {
    directory: TempDir,
    params: CertificateParams,
    key: KeyPair,
    algorithm: &'static SignatureAlgorithm,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::of("test CA", &PKCS_ECDSA_P256_SHA256)
    }

    /// A CA with this name, whose keys, and those of what it signs, are of one kind.
    pub(crate) fn of(name: &str, algorithm: &'static SignatureAlgorithm) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let params = ca_params(name);
        let key = KeyPair::generate_for(algorithm).unwrap();
        std::fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory, params, key, algorithm }
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.path("ca.pem")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A file with this content.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    /// A certificate for 127.0.0.1, for servers and clients.
    pub(crate) fn sign(&self, name: &str) -> Pair {
        self.sign_with(name, |_| {})
    }

    /// A certificate for 127.0.0.1 with a difference.
    pub(crate) fn sign_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Pair {
        let (der, key) = self.issue(name, change);
        self.store(name, &der, &key)
    }

    /// A certificate of X.509 version 1, as `openssl x509 -req` makes it without extensions.
    pub(crate) fn sign_v1(&self, name: &str) -> Pair {
        let (der, key) = self.issue(name, |_| {});
        self.store(name, &self.without_extensions(&der), &key)
    }

    /// A self-signed CA certificate for 127.0.0.1 with its key, as a server uses it that has no CA.
    pub(crate) fn self_signed(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Pair {
        let mut params = ca_params(name);
        params.subject_alt_names = loopback().subject_alt_names;
        change(&mut params);
        let key = KeyPair::generate_for(self.algorithm).unwrap();
        self.store(name, params.self_signed(&key).unwrap().der(), &key)
    }

    fn issue(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> (Vec<u8>, KeyPair) {
        let mut params = loopback();
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        let key = KeyPair::generate_for(self.algorithm).unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        (params.signed_by(&key, &issuer).unwrap().der().to_vec(), key)
    }

    fn store(&self, name: &str, der: &[u8], key: &KeyPair) -> Pair {
        let certificate = pem::encode(&pem::Pem::new("CERTIFICATE", der));
        Pair {
            certificate: self.write(&format!("{name}.pem"), certificate),
            key: self.write(&format!("{name}.key"), key.serialize_pem()),
        }
    }

    /// Removes what version 1 does not have, and signs the rest.
    fn without_extensions(&self, der: &[u8]) -> Vec<u8> {
        const VERSION: u8 = 0xa0;
        const EXTENSIONS: u8 = 0xa3;
        let [certificate] = fields(der)[..] else { panic!("one sequence") };
        let [signed, algorithm, _] = fields(content(certificate))[..] else { panic!("three fields") };
        let kept =
            fields(content(signed)).into_iter().filter(|field| ![VERSION, EXTENSIONS].contains(&field[0]));
        let signed = value(0x30, &kept.collect::<Vec<_>>().concat());
        let signature = value(0x03, &[&[0], &self.key.sign(&signed).unwrap()[..]].concat());
        value(0x30, &[&signed, algorithm, &signature].concat())
    }

    /// A server with a certificate of this CA, which may require one from clients.
    pub(crate) fn server(&self, asks_clients: bool) -> Etcd {
        serve(&self.sign("server"), asks_clients.then(|| self.ca()))
    }
}

/// A server with this certificate.
pub(crate) fn serve(pair: &Pair, client_ca: Option<PathBuf>) -> Etcd {
    let Pair { certificate, key } = pair.clone();
    Etcd::start_with(Some(ServerTls { cert: certificate, key, client_ca })).unwrap()
}

pub(crate) fn options(etcd: &Etcd) -> EtcdOptions {
    EtcdOptions { endpoints: vec![etcd.endpoint()], prefix: PREFIX.to_owned(), ..EtcdOptions::default() }
}

/// Options of a client that trusts this CA.
pub(crate) fn trusting(etcd: &Etcd, ca: impl AsRef<Path>) -> EtcdOptions {
    EtcdOptions { ca_file: Some(ca.as_ref().to_owned()), ..options(etcd) }
}

/// Options of a client that shows this certificate.
pub(crate) fn showing(pair: &Pair, options: EtcdOptions) -> EtcdOptions {
    let Pair { certificate, key } = pair.clone();
    EtcdOptions { cert_file: Some(certificate), key_file: Some(key), ..options }
}

fn loopback() -> CertificateParams {
    CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap()
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// DER values that stand one after the other, with their headers.
fn fields(mut der: &[u8]) -> Vec<&[u8]> {
    let mut fields = Vec::new();
    while !der.is_empty() {
        let (header, length) = header(der);
        let (field, rest) = der.split_at(header + length);
        fields.push(field);
        der = rest;
    }
    fields
}

fn content(der: &[u8]) -> &[u8] {
    &der[header(der).0..]
}

/// The lengths of a DER value's header and of its content.
fn header(der: &[u8]) -> (usize, usize) {
    match usize::from(der[1]) {
        short if short < 0x80 => (2, short),
        long => {
            let bytes = &der[2..2 + (long & 0x7f)];
            (2 + bytes.len(), bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)))
        }
    }
}

fn value(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let significant = &length[length.iter().position(|&byte| byte > 0).unwrap_or(length.len() - 1)..];
    // Go refuses a longer header than necessary.
    let header = match content.len() {
        ..0x80 => vec![tag],
        _ => vec![tag, 0x80 | u8::try_from(significant.len()).unwrap()],
    };
    [&header, significant, content].concat()
}
