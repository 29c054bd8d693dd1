{{- define "ringfort.labels" -}}
app.kubernetes.io/name: ringfort
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ringfort.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}
